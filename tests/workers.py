"""How `pytest -n` shares the tests out: what belongs together runs in one worker, what takes longest starts first."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from xdist.scheduler import LoadScopeScheduling

# By the files' names.
SEVERAL_PROCESSES = re.compile(r"distributed|_ddp|parallel")  # one such test at a time, or their processes starve
WHOLE_FILES = re.compile(r"test_train|test_benchmarks")  # whose fixtures train or measure, once for the file


def unit(nodeid: str) -> str:
    """Tests of one unit run in one worker, in order: mostly the cases of a function, which share oracles."""
    path, _, function = nodeid.partition("::")
    if "/gpu/" in path:
        return "gpu"  # there is one device
    if SEVERAL_PROCESSES.search(path):
        return "several processes"
    if WHOLE_FILES.search(path):
        return path
    if "test_cuda_by_value" in path:
        return nodeid  # each is a process of its own, and long
    return f"{path}::{function.partition('[')[0]}"


def long_ones_first(items: list[pytest.Item]) -> None:
    """Files that train and tests that ask for more time, then units of many tests: so that the workers end together."""
    units = [unit(item.nodeid) for item in items]
    sizes = Counter(units)
    whole = {name for name in sizes if "::" not in name and name != "gpu"}
    long = whole | {name for item, name in zip(items, units, strict=True) if item.get_closest_marker("timeout")}
    order = {name: (name not in long, name not in whole, -size) for name, size in sizes.items()}
    items.sort(key=lambda item: order[unit(item.nodeid)])


class Scheduling(LoadScopeScheduling):
    """xdist's, by these units, in the order of the items."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
