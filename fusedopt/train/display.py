"""What is seen while training: a progress bar on a terminal, else plain lines; nothing on other ranks."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20  # of progress in a run, where there is no terminal


class Display:
    """Context manager around the training loop."""

    def __init__(self, steps: int, enabled: bool):
        self.steps, self.enabled = steps, enabled
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress = None
        if enabled and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )

    def __enter__(self) -> Display:
        if self.progress is not None:
            self.task = self.progress.add_task("", total=self.steps)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self.enabled:
            self.console.print(text, markup=False)

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Show one step: its log rows, one per contender."""
        step, evaluated = rows[0]["step"], "val_loss" in rows[0]
        losses = "  ".join(f"{row['contender']} {row['loss']:.4f}" for row in rows)
        if evaluated:
            losses += "  validation " + "  ".join(f"{row['val_loss']:.4f}" for row in rows)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=losses)
        elif evaluated or step % -(-self.steps // LINES) == 0:
            width = len(str(self.steps))
            self.line(f"step {step:{width}}/{self.steps}  {losses}")
