"""Tests that several processes run together: `@pytest.mark.processes(4)`.

A test so marked is called in that many gloo processes at once. They are forked once for all that pytest selected, from
a process that has imported torch, and go through them in pytest's order; each is told as a test of its own. After a
failure, a death or a hang they are killed and start anew behind it, a few times; what is left then is "not run".
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SECONDS = 90  # that one check may take, on a busy machine, before all are killed
GRACE = 5  # for the others, once one rank has failed: they may wait for it for ever
RESTARTS = 3


class Check(NamedTuple):
    """A test as another process can find and call it."""

    id: str
    module: str
    function: str
    arguments: dict[str, Any]


# --- in pytest's process ---


class Told:
    """What one group of processes has told so far, read as it comes."""

    def __init__(self, world: int, checks: list[Check]) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.launcher = subprocess.Popen(
            [sys.executable, __file__, str(world)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.launcher.stdin.write(pickle.dumps(checks))
        self.launcher.stdin.close()
        self.expected = len(checks)
        self.found: dict[str, tuple[str, str]] = {}

    def outcome(self, id: str) -> tuple[str, str]:
        """Wait until a check has been told: ("passed", ""), or "skipped" or "failed" and why."""
        while id not in self.found:
            line = self.launcher.stdout.readline()
            if not line:
                self.errors.seek(0)
                return "failed", f"the processes' launcher died:\n{self.errors.read()[-4000:]}"
            told = json.loads(line)
            self.found[told["id"]] = told["outcome"], told["why"]
        return self.found[id]

    def end(self) -> None:
        if len(self.found) < self.expected:  # pytest stops early
            self.launcher.terminate()  # its children die with it: see _forked
        self.launcher.wait()
        self.launcher.stdout.close()
        self.errors.close()


class Plugin:
    """Registered by tests/conftest.py."""

    def __init__(self) -> None:
        self.groups: dict[int, Told] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        world = _world(pyfuncitem)
        if world is None:
            return None
        if world not in self.groups:
            checks = [_check(item) for item in pyfuncitem.session.items if _world(item) == world]
            self.groups[world] = Told(world, checks)
        outcome, why = self.groups[world].outcome(pyfuncitem.nodeid)
        if outcome == "skipped":
            pytest.skip(why)
        if outcome == "failed":
            pytest.fail(why, pytrace=False)
        return True

    def pytest_sessionfinish(self) -> None:
        for told in self.groups.values():
            told.end()


def _world(item: pytest.Item) -> int | None:
    marker = item.get_closest_marker("processes")
    return marker.args[0] if marker else None


def _check(item: pytest.Function) -> Check:
    arguments = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    return Check(item.nodeid, item.module.__name__, item.originalname, arguments)


# --- in the launcher ---


class _Ranks:
    """The processes, forked; each goes through the checks and tells of each (index, outcome, why)."""

    def __init__(self, world: int, checks: list[Check], folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.folder = folder
        self.pipes, self.processes = [], []
        for rank in range(world):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_forked, args=(rank, world, checks, folder, writer), daemon=True)
            process.start()
            writer.close()
            self.pipes.append(reader)
            self.processes.append(process)

    def outcome(self, index: int) -> tuple[str, str]:
        """Wait for all ranks to tell of a check; where it failed in one, all are dead afterwards."""
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        problems: list[str] = []
        skipped = ""
        deadline = time.monotonic() + SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in multiprocessing.connection.wait(list(waiting), timeout=left):
                rank = waiting.pop(pipe)
                try:
                    told, outcome, why = pipe.recv()
                    assert told == index
                except EOFError:
                    self.processes[rank].join(GRACE)
                    outcome, why = "failed", f"it died, exit status {self.processes[rank].exitcode}"
                skipped = why if outcome == "skipped" else skipped
                if outcome == "failed":
                    problems.append(f"rank {rank}: {why}")
                    deadline = min(deadline, time.monotonic() + GRACE)
        if waiting and not problems:
            problems.append(f"rank(s) {sorted(waiting.values())} did not come back in {SECONDS} s")
        if problems:
            problems += [f"rank {rank} was here:\n{self._stack(rank)}" for rank in sorted(waiting.values())]
            self.kill()
            return "failed", "\n\n".join(problems)
        return ("skipped", skipped) if skipped else ("passed", "")

    def _stack(self, rank: int) -> str:
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, signal.SIGUSR1)  # answered by faulthandler
            time.sleep(0.3)
        return (self.folder / f"stack{rank}").read_text()[:1500]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _launch(world: int, checks: list[Check]) -> None:
    import torch

    torch.set_num_threads(1)  # before the fork: no thread of a pool may be lost in it

    def tell(check: Check, outcome: str, why: str) -> None:
        print(json.dumps({"id": check.id, "outcome": outcome, "why": why}), flush=True)

    for module in {check.module for check in checks}:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as name:
        start = 0
        for attempt in range(1 + RESTARTS):
            folder = Path(name) / str(attempt)
            folder.mkdir()
            ranks = _Ranks(world, checks[start:], folder)
            for index, check in enumerate(checks[start:]):
                outcome, why = ranks.outcome(index)
                tell(check, outcome, why)
                if outcome == "failed":
                    break
            start += index + 1
            if start == len(checks):
                ranks.kill()
                return
        for check in checks[start:]:
            tell(check, "failed", f"not run: {1 + RESTARTS} checks before it have failed")


# --- in each process ---


def _forked(rank: int, world: int, checks: list[Check], folder: Path, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: a launcher that is killed takes these along
    os.dup2(2, 1)  # the launcher's output is for what it tells
    stack = open(folder / f"stack{rank}", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stack)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    store = dist.FileStore(str(folder / "store"), world)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    for index, check in enumerate(checks):
        torch.manual_seed(0)
        outcome, why = "passed", ""
        try:
            getattr(sys.modules[check.module], check.function)(**check.arguments)
            dist.barrier()
        except pytest.skip.Exception as skipped:
            outcome, why = "skipped", str(skipped)
        except BaseException:
            outcome, why = "failed", traceback.format_exc()
        pipe.send((index, outcome, why))
        if outcome == "failed":
            break
    time.sleep(SECONDS)  # until it is killed: the others may still talk to this one, or wait for it


if __name__ == "__main__":
    sys.modules["processes"] = sys.modules["__main__"]  # what was pickled was found there
    _launch(int(sys.argv[1]), pickle.loads(sys.stdin.buffer.read()))
