"""python -m fused_attn."""

from .cli import main

main(prog_name="fused-attn")
