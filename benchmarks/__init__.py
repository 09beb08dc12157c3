"""What Lexel's kernels cost beside their peers: `python -m benchmarks quantizers`."""
