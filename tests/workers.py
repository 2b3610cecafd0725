"""How `pytest -n` shares the tests out: what belongs together runs in one worker, what takes longest starts first."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/gpu/",)  # there is one device
FILES = ("test_train.py", "test_train_losses.py", "test_benchmarks.py")  # whose fixtures train or measure once a file


def unit(nodeid: str) -> str:
    """Tests of one unit run in one worker, in order: the cases of a function, which share oracles."""
    path, _, function = nodeid.partition("::")
    for folder in TOGETHER:
        if path.startswith(folder):
            return folder
    if path.endswith(FILES):
        return path
    if path.endswith("test_cuda_by_value.py"):
        return nodeid  # each is a process of its own, and long
    return f"{path}::{function.partition('[')[0]}"


def long_ones_first(items: list[pytest.Item]) -> None:
    """Files that train and tests that ask for more time, then units of many tests: so that the workers end together."""
    sizes: dict[str, int] = {}
    for item in items:
        sizes[unit(item.nodeid)] = sizes.get(unit(item.nodeid), 0) + 1

    def order(item: pytest.Item) -> tuple[bool, int]:
        long = item.get_closest_marker("timeout") is not None or unit(item.nodeid).endswith(FILES)
        return not long, -sizes[unit(item.nodeid)]

    items.sort(key=order)


class Scheduling(LoadScopeScheduling):
    """xdist's, by these units, in the order of the items."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
