"""Why something of another library's did not work: the line of its error that decides, and nothing of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST = 205
# What decides, best first, in the output of pip, of compilers and of Python: the last such line of the output.
DECISIVE = (
    r"fatal error: .+",
    r"\b(?!CalledProcessError|RuntimeError: Error compiling)[A-Z]\w*(?:Error|Exception): .+"
    r"|^(?:[a-z_]\w*\.)+(?!CalledProcessError)[A-Z]\w*: .+",
    r"(?i:error): .+",
)
WANTS_GPU = re.compile(r"cuda|gpu|nvidia|nvcc|active driver", re.IGNORECASE)  # Triton: "0 active drivers"

URL = re.compile(r"\b(?:git\+)?\w+://[^\s'\")>]+")
HOST = re.compile(r"host=(['\"])[^'\"]*\1|\b(?:\d{1,3}\.){3}\d{1,3}\b")
PATH = re.compile(r"(?<![\w.])~?(?:/[\w.+@-]+){2,}/?")
FILE = re.compile(r"/([\w+-]+(?:\.[\w+-]+)+)$")


def decisive(text: str) -> str:
    lines = [line.strip(" |>\t") for line in text.splitlines() if line.strip(" |>\t")]
    for pattern in DECISIVE:
        found = [match[0] for line in lines if (match := re.search(pattern, line))]
        if found:
            return found[-1]
    return lines[-1] if lines else ""


def clean(text: str) -> str:
    """One short line without paths (a file keeps its name), addresses and hosts, fit for a cell of a table."""
    text = PATH.sub(lambda path: FILE.search(path[0])[1] if FILE.search(path[0]) else "...", URL.sub("...", text))
    text = " ".join(HOST.sub("...", text).replace("|", "/").split())
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 5) // 2  # what was wanted often stands at the end
    return f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"


def of_text(text: str) -> str:
    """Of what a command printed."""
    return clean(decisive(text))


def of_error(error: BaseException) -> str:
    """Of an exception and of what it says was its cause."""
    return clean("; because of ".join(_words(each) for each in _causes(error)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    first = decisive(str(error)) if len(lines) > 8 else " ".join(lines[:2])  # a long one is another program's output
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
