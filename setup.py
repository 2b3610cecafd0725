"""Builds the native core: plain C++17 and CUDA, no torch. Needs pybind11 and ninja, which pip's isolated build fetches.

FUSEDOPT_REQUIRE_NATIVE=1 makes a failed native build fail the installation; otherwise fusedopt installs without it,
runs on PyTorch's own kernels, and `python -m fusedopt` says why. FUSEDOPT_CUDA=auto|0|1 is about its CUDA part; see
build_tools/cuda.py for what else is read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # an isolated build does not look here
from build_tools import BuildFailed, native  # noqa: E402


class NinjaBuild(build_ext):
    """Leaves the library and, beside it, what is known of its build."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {"native": True}
        try:
            info |= native.build(target)
        except BuildFailed as failure:
            if "1" in (os.environ.get("FUSEDOPT_REQUIRE_NATIVE"), os.environ.get("FUSEDOPT_CUDA")):
                raise RuntimeError(f"{failure}. To get it: {failure.remedy}") from failure
            info = {"native": False, "reason": str(failure), "remedy": failure.remedy}
            target.unlink(missing_ok=True)
            print(
                f"fusedopt: installing without the native core: {failure}. To get it: {failure.remedy}", file=sys.stderr
            )
        self.build_info = json.dumps(info, indent=2) + "\n"
        (target.parent / "_build_info.json").write_text(self.build_info)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        (ROOT / "fusedopt" / "_build_info.json").write_text(self.build_info)


setup(
    ext_modules=[Extension("fusedopt._native", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
