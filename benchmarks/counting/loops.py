"""Which loops of the AVX-512 build are held to a budget, and what is counted of each."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from . import disassembly

ISA = "avx512"
RULES = {
    "adam": "Adam",
    "adam amsgrad": "AdamAmsgrad",
    "adamw": "AdamW",
    "adamw amsgrad": "AdamWAmsgrad",
    "rmsprop": "RMSprop",
    "rmsprop centered": "RMSpropCentered",
    "rmsprop momentum": "RMSpropMomentum",
    "rmsprop centered momentum": "RMSpropCenteredMomentum",
    "adagrad": "AdagradRule",
    "sgd": "SGD",
    "sgd momentum": "SGDMomentum",
    "lion": "LionRule",
}
PLAIN = r"\(Target\)0, false, \(Scaling\)0"  # class indices, no weights, no cap
DTYPES = {"f32": ("float", 4), "bf16": ("bf16", 2), "f16": ("f16", 2)}


class Loop(NamedTuple):
    """A kernel's hottest loop: of the function whose name, its namespace left out, fits."""

    name: str
    function: str
    element: int  # bytes of the narrowest elements that it walks
    streams: bool = True  # what it moves is memory's, and not a block in the cache


def loops() -> list[Loop]:
    found = [
        Loop(f"{name} {label}", rf"step_span<{rule}, {kind}, {kind}, {kind}>", size)
        for label, (kind, size) in DTYPES.items()
        for name, rule in RULES.items()
    ]
    found += [
        Loop("adamw 8-bit", r"step_codes<AdamW>\(.*lambda", 1, streams=False),
        Loop("8-bit codes, encode", r"^encode\(", 1, streams=False),
        Loop("random bits", r"^random_elements\(", 2, streams=False),
    ]
    for label, (kind, size) in DTYPES.items():
        found += [
            Loop(f"norm pass {label}", rf"sum_squares<{kind}>\(void const", size),
            Loop(f"mse {label}", rf"sum_squares<{kind}, true>\(", size),
            Loop(f"cross entropy, largest {label}", rf"row_max<{kind}, Logit<float, \(Scaling\)0> >", size),
            Loop(f"cross entropy, sum {label}", rf"^void forward<{kind}, {PLAIN}, false>", size, streams=False),
            # gcc takes the walk that writes in, or leaves it a function of its own
            Loop(
                f"cross entropy, backward {label}",
                rf"^void (write_grad<{kind}, {PLAIN}, float, )?backward<{kind}, {PLAIN}>",
                size,
            ),
        ]
    return found


def missing() -> str:
    if sys.platform != "linux":
        return f"the budgets are of Linux, and this is {sys.platform}"
    return "" if shutil.which("objdump") else "needs objdump"


def short(name: str) -> str:
    """A demangled name without namespaces."""
    return name.replace(f"fusedopt::{ISA}::", "").replace("(anonymous namespace)::", "").replace("fusedopt::", "")


def count(library: Path) -> dict[str, float]:
    """By name: instructions for 16 elements, divisions and roots among them, those of a single float, and bytes.

    Raises RuntimeError where none is found.
    """
    found: dict[str, float] = {}
    wanted = {loop: re.compile(loop.function) for loop in loops()}
    for name, code in disassembly.functions(disassembly.objdump(library), re.compile(rf"fusedopt::{ISA}::")):
        for loop in (loop for loop, pattern in wanted.items() if pattern.search(short(name))):
            if (turn := disassembly.hottest(code)) is None:
                continue
            elements = turn.advance / loop.element
            figures = {
                "instructions for 16": turn.instructions * 16 / elements,
                "divisions for 16": turn.divisions * 16 / elements,
                "scalar floats": turn.scalars,
            }
            if loop.streams:
                figures["bytes each"] = (turn.loaded + turn.stored) / elements
            for what, figure in figures.items():  # of clones the worst
                key = f"loop {loop.name}: {what}"
                found[key] = max(found.get(key, 0.0), round(figure, 3))
    if not found:
        raise RuntimeError(f"{library} names no function of {ISA}: was it stripped?")
    order = {loop.name: place for place, loop in enumerate(wanted)}
    return dict(sorted(found.items(), key=lambda pair: order[pair[0].removeprefix("loop ").split(":")[0]]))
