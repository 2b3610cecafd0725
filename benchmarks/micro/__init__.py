"""One kernel, one call, one size: pytest-benchmark's cases, for --benchmark-autosave and --benchmark-compare."""
