"""``python -m fusedopt.train``: parse, train, report; every exit code is decided here."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from .distributed import World
from .errors import LostRank, Stop, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, 1 for a non-finite loss, 2 for bad input, 3 for a lost rank, 128 + a signal."""
    try:
        from .checks import check
        from .cli import device_of, make_parser
        from .run import run
    except ModuleNotFoundError as missing:
        print(f"fusedopt.train needs {missing.name}: pip install 'fusedopt[train]'", file=sys.stderr)
        return 2

    parser = make_parser()
    args = parser.parse_args(argv)
    world = World.from_environment(split=args.parallel == "tp")
    code, complaint = 0, ""
    try:
        with world.joined(device_of(args), args.timeout):
            with world.agreeing():
                check(args, world)
            code = run(args, world, command=["fusedopt.train", *(sys.argv[1:] if argv is None else argv)])
    except Stop as stop:
        code, complaint = stop.code, str(stop)
    # DDP holds the process group: were it to die with the interpreter, its threads could abort the exit (SIGABRT)
    gc.collect()
    if code == UsageError.code and world.is_main:
        parser.error(complaint)
    if complaint and (world.is_main or code == LostRank.code):  # rank 0 may be the one that is lost
        rank = f" on rank {world.rank}" if code == LostRank.code else ""
        print(f"fusedopt.train: error{rank}: {complaint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
