"""Small steps of every rule, for compute-sanitizer; `make gpu-sanitize` runs it under each of its tools."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from optim_table import DTYPES, WITH_LION, make_params, train  # noqa: E402

for case in WITH_LION:
    for dtypes in DTYPES:
        train(case.fused(make_params(dtypes, device="cuda"), backend="cuda"), dtypes, steps=2)
print("all rules stepped")
