"""What fusedopt does among many processes, on torch.distributed alone: no engine of its own.

Optimizers and losses need nothing from here: they know DTensors and process groups themselves.
"""

from __future__ import annotations

from fusedopt.distributed.backward import StepInBackward, step_in_backward

__all__ = ["StepInBackward", "step_in_backward"]
