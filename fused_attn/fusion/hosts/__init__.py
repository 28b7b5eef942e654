"""How the blocks of known libraries are recognised: one file a library."""
