"""Instructions of the native CPU kernels and of the host path, counted by valgrind in one process (watched.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fusedopt.backends import cpu

HERE = Path(__file__).resolve().parent
ISA = "avx2"  # the widest that valgrind knows
KERNEL = re.compile(rf"\bfusedopt::{ISA}::")
NORM = re.compile(r"sum_squares<[^,]*>\(void const\*")
NATIVE = re.compile(r"/_native[^/]*\.so$")
C_LIBRARY = re.compile(r"/libc[.-][^/]*$|/ld-linux[^/]*$|^\?\?\?$")  # what malloc finds is another thing each time


class Part(NamedTuple):
    """One watched call: instructions by (object file, function), calls left to whom they call."""

    work: str
    size: int
    own: dict[tuple[str, str], int]


def missing() -> str:
    """Why nothing can be counted here; "" where it can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return f"the budgets are of Linux on x86-64, and this is {sys.platform} on {os.uname().machine}"
    if cpu.available() is not True or ISA not in cpu._native.cpu_isas():
        return f"this machine and build do not offer {ISA}"
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    probe = subprocess.run(
        ["cc", "-fsyntax-only", "-xc", "-"], input="#include <valgrind/callgrind.h>\n", capture_output=True, text=True
    )
    return "" if probe.returncode == 0 else "needs valgrind's headers (valgrind/callgrind.h)"


def parse(lines: Iterable[str]) -> Part | None:
    """A file that callgrind has written with uncompressed names; None where no end(part) of marks.c asked for it."""
    named = None
    library = function = ""
    inclusive = False  # the line after `calls=` is the callee's
    own: dict[tuple[str, str], int] = defaultdict(int)
    for line in lines:
        if inclusive:
            inclusive = False
        elif line[:1].isdigit():
            _, *cost = line.split()
            own[library, function] += int(cost[0]) if cost else 0
        elif line.startswith("fn="):
            function = line[3:].rstrip("\n")
        elif line.startswith("ob="):
            library = line[3:].rstrip("\n")
        elif line.startswith("calls="):
            inclusive = True
        elif found := re.match(r"desc: Trigger: Client Request: (.*)\|(\d+)$", line):
            named = found[1], int(found[2])
    return Part(*named, dict(own)) if named else None


def run(path: Iterable[Path], folder: Path) -> list[Part]:
    """Watch all work, with the packages of `path`. Raises RuntimeError, with what was said, where it fails."""
    marks = folder / "marks.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", HERE / "marks.c", "-o", marks], check=True)
    out = folder / "callgrind"
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-line=no", "--compress-strings=no",
               "--compress-pos=no", f"--callgrind-out-file={out}",
               sys.executable, "-m", "benchmarks.counting.watched", marks]  # fmt: skip
    if shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
        command = ["setarch", "-R", *command]  # the same addresses each time, and so the same hashes of objects
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "FUSEDOPT_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "FUSEDOPT_CPU": ISA,
    }
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    parts = []
    for file in folder.glob("callgrind.*"):
        with file.open(encoding="utf-8", errors="replace") as lines:
            if part := parse(lines):
                parts.append(part)
    return parts


def counts(parts: list[Part]) -> dict[str, float]:
    """What is held to a budget, by name: per element, logit or tensor, and what a call costs besides."""
    from .watched import work

    by_size = {(part.work, part.size): part.own for part in parts}
    found: dict[str, float] = {}
    for kind in work():
        small, large = kind.sizes
        each = [by_size[kind.name, size] for size in kind.sizes]
        n, more = small * kind.units, (large - small) * kind.units

        def slope_and_rest(totals: list[int], n: int = n, more: int = more) -> tuple[float, float]:
            slope = (totals[1] - totals[0]) / more
            return round(slope, 4), round(totals[0] - slope * n, 1)

        native = [sum(c for (lib, _), c in own.items() if NATIVE.search(lib)) for own in each]
        kernels = [sum(c for (_, name), c in own.items() if KERNEL.search(name)) for own in each]
        if kind.of == "host":
            around = [sum(c for (lib, _), c in own.items() if not C_LIBRARY.search(lib)) for own in each]
            pairs = {
                "native": [a - b for a, b in zip(native, kernels, strict=True)],
                "native, Python and torch": [a - b for a, b in zip(around, kernels, strict=True)],
            }
            for what, totals in pairs.items():
                slope, rest = slope_and_rest(totals)
                found[f"{kind.name}: a {kind.unit}, {what}"] = slope
                found[f"{kind.name}: a call, {what}"] = rest
        elif kind.of == "norm":
            totals = [sum(c for (_, name), c in own.items() if NORM.search(name)) for own in each]
            found[f"cpu {kind.name}: an {kind.unit}"] = slope_and_rest(totals)[0]
        else:
            slope, _ = slope_and_rest(kernels)
            found[f"cpu {kind.name}: a{'n' * (kind.unit == 'element')} {kind.unit}"] = slope
            found[f"cpu {kind.name}: a call"] = round(native[0] - slope * n, 1)
    return found


def count(path: Iterable[Path]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return counts(run(path, Path(folder)))
