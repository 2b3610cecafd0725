"""The other processes of a run: where each is, and which of them is gone when a collective fails."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from .errors import LostRank

STARTING = 300.0  # seconds
GRACE = 5.0  # in which the others notice too: a failed collective breaks the connections of all


@dataclass(frozen=True)
class Place:
    """One process."""

    host: str
    pid: int

    def is_gone(self) -> bool:
        """Whether a process of this machine has ended, or stands still."""
        status = Path(f"/proc/{self.pid}/stat")
        if Path("/proc/self/stat").exists():
            try:
                return status.read_text().rpartition(")")[2].split()[0] in "ZXTt"
            except (FileNotFoundError, ProcessLookupError):
                return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


class Roll:
    """Who takes part, and who still answers: each rank signs in under a key of the store that torchrun keeps."""

    def __init__(self, store: dist.Store, rank: int, places: list[Place]):
        self.store, self.rank, self.places = store, rank, places

    def gone(self, timeout: float) -> str:
        """The ranks that a failed collective has missed, as words; none if all are there: the failure is another.

        Those on this machine are looked up. Those elsewhere have a moment to sign in, as all do whose collective fails.
        """
        others = {rank: place for rank, place in enumerate(self.places) if rank != self.rank}
        here = {rank: place for rank, place in others.items() if place.host == self.places[self.rank].host}
        end = time.monotonic() + min(timeout, GRACE)
        absent = others.keys() - here.keys()
        while time.monotonic() < end:
            dead = {rank for rank, place in here.items() if place.is_gone()}
            if dead:
                return self._words(dead, "has ended or stands still")
            try:
                self.store.set(f"here/{self.rank}", b"")
                absent = {rank for rank in others if not self.store.check([f"here/{rank}"])}
            except RuntimeError:  # the store was in a process that is gone, and with it the others' answers
                pass
            if not absent:
                return ""
            time.sleep(0.05)
        return self._words(absent - here.keys(), "does not answer")

    def _words(self, ranks: set[int], what: str) -> str:
        named = (f"rank {rank} (process {self.places[rank].pid} on {self.places[rank].host})" for rank in sorted(ranks))
        return " and ".join(f"{name} {what}" for name in named)


def meet(rank: int, size: int, timeout: float) -> Roll:
    """Wait for all ranks at the store of torchrun's rendezvous, or of rank 0 at MASTER_ADDR and MASTER_PORT.

    Raises:
        LostRank: one has not come; they have five minutes at least, as programs may start at different times.
    """
    patience = timedelta(seconds=max(timeout, STARTING))
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=patience))
        # a worker that torchrun has restarted must not find the keys of its predecessors
        store = dist.PrefixStore(f"fusedopt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        place = Place(socket.gethostname(), os.getpid())
        store.set(f"place/{rank}", f"{place.pid} {place.host}")
        keys = [f"place/{other}" for other in range(size)]
        store.wait(keys, patience)
    except dist.DistError as error:
        raise LostRank(f"not all of {size} processes have joined within {patience}: {error}") from error
    told = (store.get(key).decode().split(" ", 1) for key in keys)
    return Roll(store, rank, [Place(host, int(pid)) for pid, host in told])


def end_by_ourselves() -> None:
    """Let torchrun, which ends all processes when one has died, not cut off the message of those who tell which."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error tells of a lost connection or of a wait that was too long; gloo raises plain RuntimeErrors."""
    if failures := getattr(error, "failures", None):  # of torch.distributed.checkpoint, by rank
        return any(is_of_a_collective(cause) for cause, _ in failures.values())
    told = re.search("gloo|peer|timed out|timeout|connection", str(error), re.IGNORECASE)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and told is not None)
