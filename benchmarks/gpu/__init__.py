"""The GPU suite: `python -m benchmarks.gpu`. Every part runs in a process of its own and leaves its own JSON."""
