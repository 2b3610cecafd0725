"""Measurements against stock PyTorch; see `python -m benchmarks --help`."""

import os

# torch's profiler, which counts memory, tells of itself on stderr; it reads this when torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
