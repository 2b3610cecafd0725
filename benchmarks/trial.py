"""Every peer on its own: can it be had, does it run here, is it right, and how long does a small case take beside ours.

`python -m benchmarks peers` asks the running Python's environment. With `--install` each package is installed as its
user would do it, into a fresh environment that sees this Python's torch and may not replace it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import peers, reasons
from .machine import ROOT
from .peers import Peer
from .probe import KINDS, NOT_IMPORTED, RAN, WRONG
from .tables import digits

Row = dict[str, Any]
NOT_INSTALLED = "failed to install"
OTHERS_NAME = "on the index the name is another project's; this one is built from its source"
APEX_VARIABLES = {"APEX_CPP_EXT": "1", "APEX_CUDA_EXT": "1"}  # without them it installs, and has no FusedAdam
WORDS = 4  # columns of the table that hold words
INSTALL_SECONDS, PROBE_SECONDS = 300, 900  # of one call of pip; of a probe, which may compile C++
TURNS, QUICK_TURNS = 20, 3

UNITS = {
    "outcome": f"{RAN}; {WRONG}: error > error_limit; or what failed, and `reason` is the line that says why",
    "work": "what was checked against float64, and timed",
    "error": "max |result - float64 oracle| / max(|oracle|, median |oracle|), in epsilons of the dtype",
    "median_ms, ours_ms": "milliseconds of one run, the peer's and fusedopt's, which took turns",
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--install", action="store_true", help="each package anew, in an environment of its own")
    command.add_argument("--apex", metavar="DIR", help="with --install: a checkout of apex, which is on no index")


def cases(quick: bool = False) -> list[str]:
    return [peer.name for peer in peers.PEERS]


def keeps(row: Row) -> bool:
    """Whether a row of an earlier run stands: versions change, and so does what is installed."""
    return False


def measure(case: str, args: argparse.Namespace, tell: Callable[[str], None]) -> list[Row]:
    """What happened to a peer: one row."""
    peer = peers.BY_NAME[case]
    device = args.device if args.device in peer.devices else peer.devices[0]
    device = device if torch.cuda.is_available() else "cpu"
    row = {"case": case, "contender": peer.package, "kind": peer.kind, "device": device, "work": KINDS[peer.kind].work}
    row |= {"installed": "anew" if args.install else "before"}
    if args.install:
        tell("installing")
        environment = _environment(pip_words(peer, args.apex))
        found = environment.failed or _probe(peer, device, args.quick, environment.python, environment.variables, tell)
        if not peer.on_index and not args.apex and found["outcome"] == NOT_IMPORTED:
            found |= {"outcome": NOT_INSTALLED, "reason": OTHERS_NAME}
    else:
        found = _probe(peer, device, args.quick, sys.executable, {}, tell)
    return [row | found | {"verdict": {RAN: "ok", WRONG: "wrong"}.get(found["outcome"], "raised")}]


# --- installing ---


def pip_words(peer: Peer, source: str | None) -> tuple[str, ...]:
    """What pip is to install; nothing for a peer that is on no index and whose source is not here."""
    if peer.on_index:
        return peer.install or (peer.package,)
    return ("--no-build-isolation", str(Path(source).resolve())) if source else ()


class Environment:
    """One package in a fresh virtual environment, after which torch is still the running Python's."""

    def __init__(self, words: tuple[str, ...]):
        self.folder = tempfile.TemporaryDirectory(prefix="peer-")
        root = Path(self.folder.name)
        venv.create(root / "venv", with_pip=True)
        self.python = str(root / "venv" / "bin" / "python")
        status, output = _run([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], 60)
        # this Python's packages, torch among them, after the environment's own; its editable fusedopt is not followed
        present = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (Path(output.strip()) / "present.pth").write_text("\n".join(present) + "\n")
        (root / "constraints.txt").write_text(f"torch=={version('torch')}\n")
        here = [str(Path(self.python).parent), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        self.variables = {"PATH": os.pathsep.join(here), "TORCH_EXTENSIONS_DIR": str(root / "extensions")}
        self.variables |= APEX_VARIABLES
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install", "-c", str(root / "constraints.txt")]
        self.failed: Row = {}
        # the package itself, even where the running Python has it; then whatever it needs and that Python has not
        for options in [["--ignore-installed", "--no-deps"], []] if words else []:
            status, output = _run([*pip, *options, *words], INSTALL_SECONDS, self.variables)
            if status != 0:
                reason = reasons.of_text(output) if status else f"no end within {INSTALL_SECONDS} s"
                self.failed = {"outcome": NOT_INSTALLED, "reason": reason}
                return


@functools.lru_cache(maxsize=1)  # peers of a package follow each other; the folder goes with the object
def _environment(words: tuple[str, ...]) -> Environment:
    return Environment(words)


def _run(command: list[str], seconds: float, variables: dict[str, str] | None = None) -> tuple[int | None, str]:
    """Exit status, None past the time, and all that was printed; the children of the command end with it."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | (variables or {}), text=True, errors="replace",
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too
            process.communicate()


# --- trying ---


def _probe(
    peer: Peer, device: str, quick: bool, python: str, variables: dict[str, str], tell: Callable[[str], None]
) -> Row:
    """In a process of its own: a peer may hang, end it, or change what it imports."""
    tell("trying")
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        turns = QUICK_TURNS if quick else TURNS
        command = [python, "-m", "benchmarks.probe", peer.name, device, str(turns), str(told)]
        status, output = _run(command, PROBE_SECONDS, variables)
        found = json.loads(told.read_text()) if told.exists() else {"outcome": NOT_IMPORTED}
    if "reason" not in found:  # it did not live to say
        died = f"ended by signal {signal.Signals(-status).name}" if status and status < 0 else reasons.of_text(output)
        found["reason"] = f"no end within {PROBE_SECONDS} s" if status is None else died
    return found


# --- telling ---


def table(rows: list[Row]) -> tuple[list[str], list[list[str]], str]:
    """Header, cells and a note, for the README."""
    header = ["peer", "version", "what", "outcome", "error, eps", "its time", "ours", "ratio"]
    cells = []
    rows = sorted(rows, key=lambda row: list(peers.KINDS).index(row["kind"]))
    for row in rows:
        said = f"{row['outcome']}: {row['reason']}" if row["reason"] else row["outcome"]
        figures = [str(row.get("error", "")), "", "", ""]
        if "median_ms" in row:
            figures[1:3] = [f"{digits(row[key])} ms" for key in ("median_ms", "ours_ms")]
            figures[3] = f"{row['median_ms'] / row['ours_ms']:.2f}x"
        cells.append([row["case"], row.get("version") or "", peers.KINDS[row["kind"]], said, *figures])
    works: dict[str, list[str]] = {}  # work -> what is tried by it
    for kind in dict.fromkeys(row["kind"] for row in rows):
        works.setdefault(KINDS[kind].work, []).append(peers.KINDS[kind])
    done = "; ".join(f"{', '.join(titles)}: {work}" for work, titles in works.items())
    return header, cells, f"Times are medians of turns with fusedopt's. {done}."
