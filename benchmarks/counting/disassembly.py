"""The vector loops of the AVX-512 build, read in the disassembly: nothing runs, so that any x86-64 machine can count.

Of each kernel's function the innermost loop with the most 512-bit instructions, and of that the turn that does most:
the path from its head back to its head with the most of them and else the fewest instructions. What a turn moves is
the sum of its operands in memory, and how many elements it takes follows from how far its indices go on.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HEADER = re.compile(r"^[0-9a-f]+ <(.*)>:$")
MEMORY = re.compile(r"(-?0x[0-9a-f]+)?\((%\w+)?(?:,(%\w+),(\d))?\)")
WIDTHS = {"zmm": 64, "ymm": 32, "xmm": 16}
# Operands narrower in memory than the register they come into or leave: one part in so many.
PARTS = (
    (re.compile(r"vpmov[sz]x(bw|wd|dq)$|vpmovu?s?(wb|dw|qd)$|vcvtph2ps$|vcvtps2phx?$|vcvtps2pd$|v?mov(q|[hl]ps)$"), 2),
    (re.compile(r"vpmov[sz]x(bd|wq)$|vpmovu?s?(db|qw)$|v?movd$"), 4),
    (re.compile(r"vpmov[sz]xbq$|vpmovu?s?qb$"), 8),
)
SCALAR = re.compile(r"^v?[a-z0-9]+(?:ss|sd)$")
DIVISION = re.compile(r"^v(div|sqrt)p[sd]$")
OTHER_SS = re.compile(r"^v?(p|u?comi|broadcast)")  # integers, conditions, and what fills a vector


class Instruction(NamedTuple):
    address: int
    mnemonic: str
    operands: str
    target: int | None  # of a jump within the function's file


class Turn(NamedTuple):
    """What one turn of a kernel's hottest loop is made of."""

    instructions: int
    vectors: int  # with a zmm, ymm or xmm register, and no scalar arithmetic
    scalars: int  # floating-point instructions of one element
    divisions: int  # and roots, of vectors: each as long as a dozen others
    loaded: int  # bytes
    stored: int
    advance: int  # bytes, of the slowest index; 0 where none is to be seen


def functions(lines: Iterable[str], wanted: re.Pattern[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """(demangled name, instructions) of what `objdump -dC --no-show-raw-insn` lists, where the name fits."""
    name, code = "", []
    for line in lines:
        if found := HEADER.match(line):
            if code:
                yield name, code
            name, code = found[1], []
        elif wanted.search(name) and line.startswith(" "):
            place, _, text = line.partition(":\t")
            mnemonic, _, operands = text.split("#")[0].strip().partition(" ")
            if not mnemonic or "\t" in place:
                continue
            jump = re.match(r"([0-9a-f]+) <", operands.strip()) if mnemonic.startswith("j") else None
            code.append(Instruction(int(place, 16), mnemonic, operands.strip(), int(jump[1], 16) if jump else None))
    if code:
        yield name, code


class _Graph:
    """Basic blocks of a function, as places in its list of instructions."""

    def __init__(self, code: list[Instruction]):
        self.code = code
        at = {instruction.address: i for i, instruction in enumerate(code)}
        heads = {0}
        for i, instruction in enumerate(code):
            if instruction.mnemonic.startswith(("j", "ret")):
                heads.add(i + 1)
                heads |= {at[instruction.target]} if instruction.target in at else set()
        starts = sorted(head for head in heads if head < len(code))
        self.blocks = list(zip(starts, [*starts[1:], len(code)], strict=True))
        number = {start: b for b, (start, _) in enumerate(self.blocks)}
        self.next: list[list[int]] = []
        for b, (_, stop) in enumerate(self.blocks):
            last = code[stop - 1]
            after = [number[at[last.target]]] if last.target in at else []
            if not last.mnemonic.startswith(("jmp", "ret")) and b + 1 < len(self.blocks):
                after.append(b + 1)
            self.next.append(after)
        self.back_edges = set(self._find_back_edges())

    def loops(self) -> Iterator[tuple[int, set[int]]]:
        """(head, blocks) of every loop."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for b, after in enumerate(self.next):
            for a in after:
                before[a].append(b)
        bodies: dict[int, set[int]] = defaultdict(set)
        for latch, head in self.back_edges:
            body, open_ = {head}, [latch]
            while open_:
                block = open_.pop()
                if block not in body:
                    body.add(block)
                    open_ += before[block]
            bodies[head] |= body
        yield from bodies.items()

    def _find_back_edges(self) -> Iterator[tuple[int, int]]:
        state = [0] * len(self.blocks)  # 0 new, 1 on the path, 2 done
        stack = [(0, iter(self.next[0]))]
        state[0] = 1
        while stack:
            block, rest = stack[-1]
            for after in rest:
                if state[after] == 1:
                    yield block, after
                elif state[after] == 0:
                    state[after] = 1
                    stack.append((after, iter(self.next[after])))
                    break
            else:
                state[block] = 2
                stack.pop()

    def turn(self, head: int, body: set[int]) -> list[Instruction]:
        """The path from the head back to it with the most 512-bit instructions, and else the shortest."""
        best: dict[int, tuple[tuple[int, int], list[int]]] = {}  # block -> ((zmm, -length), the way from it)

        def from_(block: int) -> tuple[tuple[int, int], list[int]] | None:
            if block in best:
                return best[block]
            start, stop = self.blocks[block]
            own = sum("%zmm" in i.operands for i in self.code[start:stop]), start - stop
            ways = [((0, 0), [])] if head in self.next[block] else []
            on = [a for a in self.next[block] if a in body and a != head and (block, a) not in self.back_edges]
            ways += [way for a in on if (way := from_(a))]
            if not ways:
                return None
            (wide, length), way = max(ways, key=lambda found: found[0])
            best[block] = (own[0] + wide, own[1] + length), [block, *way]
            return best[block]

        found = from_(head)
        return [i for b in (found[1] if found else []) for i in self.code[slice(*self.blocks[b])]]


def _is_scalar(instruction: Instruction) -> bool:
    """Arithmetic on one float; comparisons are of what is the same for all elements."""
    name = instruction.mnemonic
    return bool(SCALAR.match(name)) and not OTHER_SS.match(name) and "%xmm" in instruction.operands


def _operands(text: str) -> list[str]:
    return re.split(r",(?![^(]*\))", text)


def _width(instruction: Instruction) -> int:
    """Of a vector instruction's operand in memory, in bytes."""
    name = instruction.mnemonic
    if _is_scalar(instruction):
        return 8 if name.endswith("sd") else 4
    if name.startswith(("vinsert", "vextract")):
        return 16 if name.endswith(("128", "32x4", "64x2")) else 32
    width = max(WIDTHS[register] for register in re.findall(r"%([xyz]mm)", instruction.operands))
    return width // next((parts for pattern, parts in PARTS if pattern.match(name)), 1)


class _Moves:
    """What the vector instructions of a turn load and store: bytes that are told apart, whichever instruction moves
    them. The stack, constants and what is the same for all elements are left out."""

    def __init__(self, code: list[Instruction]):
        # (stored or not, base, index, scale), registers with the number of their writes so far -> offsets
        self.offsets: dict[tuple[bool, tuple[str, int], tuple[str, int], int], set[int]] = defaultdict(set)
        writes: dict[str, int] = defaultdict(int)
        steps: dict[str, int] = defaultdict(int)
        for instruction in code:
            self._see(instruction, writes)
            name, operands = instruction.mnemonic, _operands(instruction.operands)
            if re.fullmatch(r"%r\w+", operands[-1]) and not name.startswith(("cmp", "test", "j", "push", "v")):
                writes[operands[-1]] += 1
            constant = re.fullmatch(r"\$(0x[0-9a-f]+)", operands[0])
            if name in ("add", "sub") and constant and len(operands) == 2:
                step = int(constant[1], 16)
                step -= (step >> 63) << 64
                steps[operands[1]] += step if name == "add" else -step
            elif name == "inc":
                steps[operands[0]] += 1
        moving = {abs(steps[base] + steps[index] * scale) for _, (base, _), (index, _), scale in self.offsets}
        self.advance = min(moving - {0}, default=0)

    def _see(self, instruction: Instruction, writes: dict[str, int]) -> None:
        operands = _operands(instruction.operands)
        place = next((i for i, operand in enumerate(operands) if MEMORY.search(operand)), None)
        if place is None or "mm" not in instruction.operands or instruction.mnemonic.startswith("prefetch"):
            return
        offset, base, index, scale = MEMORY.search(operands[place]).groups()
        if base in ("%rip", "%rsp", "%rbp") or "broadcast" in instruction.mnemonic or "{1to" in operands[place]:
            return
        stored = place == len(operands) - 1 and "cmp" not in instruction.mnemonic
        first = int(offset or "0", 16)
        there, further = ((register or "", writes[register or ""]) for register in (base, index))
        self.offsets[stored, there, further, int(scale or 1)].update(range(first, first + _width(instruction)))

    def bytes(self, stored: bool) -> int:
        return sum(len(offsets) for key, offsets in self.offsets.items() if key[0] == stored)


def hottest(code: list[Instruction]) -> Turn | None:
    """A turn of the function's loop with the most 512-bit instructions, of those that hold no other such loop and move
    on; None where there is none."""
    graph = _Graph(code)
    wide: list[tuple[set[int], list[Instruction], int]] = []
    for head, body in graph.loops():
        turn = graph.turn(head, body)
        if zmm := sum("%zmm" in i.operands for i in turn):
            wide.append((body, turn, zmm))
    inner = [
        (zmm, len(turn), moves, turn)
        for body, turn, zmm in wide
        if not any(other < body for other, _, _ in wide) and (moves := _Moves(turn)).advance
    ]
    if not inner:
        return None
    _, _, moves, turn = max(inner, key=lambda found: found[:2])
    scalars = sum(map(_is_scalar, turn))
    vectors = sum(bool(re.search(r"%[xyz]mm", i.operands)) for i in turn) - scalars
    divisions = sum(bool(DIVISION.match(i.mnemonic)) for i in turn)
    return Turn(
        len(turn), vectors, scalars, divisions, moves.bytes(stored=False), moves.bytes(stored=True), moves.advance
    )


def objdump(library: Path) -> Iterator[str]:
    """Its lines. Raises subprocess.CalledProcessError where it fails."""
    command = ["objdump", "-dC", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
