"""What the machine code of the GPU kernels says of their speed, without a GPU: `python -m benchmarks.machine_code`."""
