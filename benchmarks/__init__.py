"""What fusedopt's speed claims rest on: cases, their bytes, and the runner that times them. `python -m benchmarks`."""

import os

# torch's profiler, which counts memory, tells of itself on stderr; it reads this when torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
