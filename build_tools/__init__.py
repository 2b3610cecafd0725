"""What setup.py needs besides setuptools. Standard library only; part of the source distribution, never installed."""


class BuildFailed(Exception):
    """Something cannot be built here; the message says why, `remedy` what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy
