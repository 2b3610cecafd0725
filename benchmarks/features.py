"""The README's table of losses: which feature runs in a backend's own kernels, as tests/test_loss_features.py found."""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).parent / "results" / "loss_features.json"
BACKENDS = ("cpu", "cuda", "triton")
LOSSES = {
    "cross entropy": "CE",
    "linear cross entropy": "linear CE",
    "distillation": "distil",
    "mean squared error": "MSE",
}
# Why a feature is not, or not wholly, in the kernels; (loss, feature) or the feature of any loss, or the loss
NOTES = {
    "float64": "float64 on a GPU goes to PyTorch's operations",
    "distillation": "the divergence is computed by PyTorch's operations, blocks of rows at a time; products, chunks "
    "and the labels' loss are as in the linear cross entropy",
    "mean squared error": 'reduction "none" is PyTorch\'s own',
}

Found = dict[str, dict[str, dict[str, str]]]  # backend -> loss -> feature -> "kernels", "torch" or "partly"


def read() -> Found:
    return json.loads(PATH.read_text(encoding="utf-8"))


def write(found: Found) -> None:
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table() -> str:
    """Markdown. Raises KeyError for a hole that NOTES do not explain."""
    found = read()
    order = list(dict.fromkeys(f for loss in LOSSES for f in found["cpu"][loss]))
    listed = [f for f in order if not f.startswith(("float", "bfloat"))] + [f for f in order if "float" in f]
    header = ["", *(f"{short} {backend}" for short in LOSSES.values() for backend in BACKENDS)]
    lines = ["| " + " | ".join(header) + " |", "|---|" + ":-:|" * (len(header) - 1)]
    for feature in listed:
        cells = [cell(found[backend][loss].get(feature), loss, feature) for loss in LOSSES for backend in BACKENDS]
        lines.append("| " + " | ".join([feature, *cells]) + " |")
    notes = "; ".join(f"[{i}] {note}" for i, note in enumerate(NOTES.values(), 1))
    return "\n".join(lines) + f"\n\n✓: in the backend's own kernels; -: has no meaning there; {notes}."


def cell(how: str | None, loss: str, feature: str) -> str:
    if how is None:
        return "-"
    if how == "kernels":
        return "✓"
    key = feature if feature in NOTES and loss != "distillation" else loss
    return f"[{list(NOTES).index(key) + 1}]" if key in NOTES else _unexplained(loss, feature)


def _unexplained(loss: str, feature: str) -> str:
    raise KeyError(f"{loss}: {feature} is not in the kernels, and nothing says why")
