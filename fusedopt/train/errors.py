"""What ends a run early, and the exit code of each."""

from __future__ import annotations


class Stop(Exception):
    """A run cannot start or go on; the message says why, and what to do."""

    code: int


class UsageError(Stop):
    """Bad input: what was given, what was expected, how to mend it."""

    code = 2


class NonFiniteLoss(Stop):
    """The loss is infinite or NaN; says at which step and what to try."""

    code = 1


class LostRank(Stop):
    """Another process of the run is gone, or does not answer; says which."""

    code = 3
