"""Puts the simulated library in the place of fusedopt._native, and host memory in the GPU's: import before fusedopt.

The library's path is the process's first argument.
"""

import ctypes
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

loader = importlib.machinery.ExtensionFileLoader("fusedopt._native", sys.argv[1])
native = importlib.util.module_from_spec(importlib.util.spec_from_loader("fusedopt._native", loader))
loader.exec_module(native)
sys.modules["fusedopt._native"] = native
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

from fusedopt.backends import cuda  # noqa: E402

cuda.device_types = frozenset({"cpu"})
cuda.available = lambda: True
cuda.covers = lambda device: True

control = ctypes.CDLL(sys.argv[1])  # the functions of harness/simt.h named fusedopt_simt_*
