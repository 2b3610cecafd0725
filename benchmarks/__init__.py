"""What fusedopt's speed claims rest on: cases, their bytes, and the runner that times them. `python -m benchmarks`."""
