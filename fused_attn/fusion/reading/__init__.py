"""How people's code is read: captured without data, brought into canonical form, matched, and checked."""
