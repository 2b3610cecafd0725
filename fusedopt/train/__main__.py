"""``python -m fusedopt.train``: parse, train, report; every exit code is decided here."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from .distributed import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, 1 for a non-finite loss, 2 for bad input, 128 + the signal that stopped it."""
    try:
        from .cli import UsageError, check, make_parser
        from .run import NonFiniteLoss, run
    except ModuleNotFoundError as missing:
        print(f"fusedopt.train needs {missing.name}: pip install 'fusedopt[train]'", file=sys.stderr)
        return 2

    parser = make_parser()
    args = parser.parse_args(argv)
    world = World.from_environment()
    code, complaint = 0, ""
    try:
        check(args)
        with world.joined(args.device):
            code = run(args, world, command=["fusedopt.train", *(sys.argv[1:] if argv is None else argv)])
    except UsageError as error:
        code, complaint = 2, str(error)
    except NonFiniteLoss as error:
        code = 1
        if world.is_main:
            print(f"fusedopt.train: error: {error}", file=sys.stderr)
    # DDP holds the process group: were it to die with the interpreter, its threads could abort the exit (SIGABRT)
    gc.collect()
    if complaint and world.is_main:
        parser.error(complaint)
    return code


if __name__ == "__main__":
    sys.exit(main())
