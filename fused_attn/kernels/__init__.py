"""Streaming Triton kernels, one file an op, each with functions of the op's schema.

Imported at the first call of a `.triton` operator, so `import fused_attn` needs no Triton. `language.py` holds what
kernels compute with, `maps.py` where a map's elements lie and who works on what, `passes.py` the loops over a map,
`replay.py` how a call that was made before is made again.

A batch never seen before compiles nothing: what is compiled depends on the shape without it, and whatever depends on
the batch is an argument in `maps.SIZES`.
"""
