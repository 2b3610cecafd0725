"""The regression guard: counted budgets, and how the counts are read from callgrind's files and the disassembly."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import budgets
from benchmarks.counting import callgrind, disassembly, loops

ROOT = Path(__file__).parent.parent


# --- budgets ---


def test_verdicts():
    held = {
        "cpu adamw f32: an element": {"count": 100.0, "allowed": 103.0},
        "cpu sgd f32: an element": {"count": 100.0, "allowed": 103.0},
        "cpu lion f32: an element": {"count": 100.0, "allowed": 103.0},
        "gpu adamw f32: launches": {"count": 2, "allowed": 2},
        "loop adamw f32: scalar floats": {"count": 0.0, "allowed": 0.0},
        "gpu lamb f32: launches": {"count": 4, "allowed": 4},
    }
    counted = {
        "cpu adamw f32: an element": 103.0,
        "cpu sgd f32: an element": 103.1,
        "cpu lion f32: an element": 96.9,
        "gpu adamw f32: launches": 3,
        "loop adamw f32: scalar floats": 1.0,
        "cpu lamb f32: an element": 1.0,
    }
    verdicts = {verdict.name: (verdict.text, verdict.fails) for verdict in budgets.judge(counted, held)}
    assert verdicts == {
        "cpu adamw f32: an element": ("within", False),
        "cpu sgd f32: an element": ("too many: +3.1%", True),
        "cpu lion f32: an element": ("tighten the budget: --write", False),
        "gpu adamw f32: launches": ("too many: +50.0%", True),
        "loop adamw f32: scalar floats": ("too many: +1", True),
        "gpu lamb f32: launches": ("no longer counted: --write", True),
        "cpu lamb f32: an element": ("no budget: --write", True),
    }


def test_tolerances():
    assert budgets.allowed("cpu adamw f32: an element", 100.0) == 103.0
    assert budgets.allowed("host, nothing changed: a call, native", 1000.0) == 1030.0
    assert budgets.allowed("host, nothing changed: a call, native, Python and torch", 1000.0) == 1100.0
    assert budgets.allowed("loop adamw f32: instructions for 16", 34.0) == 35.0
    assert budgets.allowed("loop adamw f32: bytes each", 28.0) == 28.0
    assert budgets.allowed("gpu adamw f32: launches", 2) == 2


class Guard:
    """`python -m benchmarks budgets` on counts and an environment of the test's own."""

    name = "cpu adamw f32: an element"
    python = "host, nothing changed: a tensor, native, Python and torch"

    def __init__(self, monkeypatch, path):
        self.path, self.counts, self.missing = path, {self.name: 100.0, self.python: 1000.0}, ""
        self.here = {"compiler": "c++ (Debian 12.2.0-14) 12.2.0", "architecture": "x86_64", "python": "3.11"}
        self.here["torch"] = "2.13"
        part = budgets.Part(("cpu ", "host"), lambda: self.missing, lambda: self.counts, True)
        monkeypatch.setattr(budgets, "PARTS", {"cpu": part})
        monkeypatch.setattr(budgets, "PATH", path)
        monkeypatch.setattr(budgets, "ROOT", path.parent)
        monkeypatch.setattr(budgets, "environment", lambda: dict(self.here))
        monkeypatch.setattr(budgets.cpu, "available", lambda: True)

    def __call__(self, *arguments):
        parser = argparse.ArgumentParser()
        parser.set_defaults(parts=["cpu"])
        budgets.add_arguments(parser)
        return budgets.main(parser.parse_args(arguments))


@pytest.fixture
def guard(monkeypatch, tmp_path):
    found = Guard(monkeypatch, tmp_path / "budgets.json")
    assert found("--write") == 0
    return found


def test_a_worse_count_fails(guard, capsys):
    assert guard("--check") == 0
    guard.counts[guard.name] = 104.0
    assert guard("--check") == 1
    assert f"{guard.name}: too many: +4.0%" in capsys.readouterr().out
    assert guard() == 0  # it tells, and was not asked to check
    assert guard("--write") == 0
    assert guard("--check") == 0


def test_better_counts_are_told_and_pass(guard, capsys):
    guard.counts[guard.name] = 90.0
    assert guard("--check") == 0
    out = capsys.readouterr().out
    assert "tighten the budget: --write" in out and "2 counted: 0 not within their budgets, 1 far below" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compiler": "c++ (GCC) 14.1.0"}, "the budgets are of c++ 12's code, and the library was built by c++ 14"),
        ({"architecture": "aarch64"}, "the budgets are of x86_64, and this is aarch64"),
        ({}, "needs valgrind"),
    ],
)
def test_what_cannot_be_counted_is_said_and_passes(guard, capsys, monkeypatch, change, said):
    monkeypatch.setenv("FUSEDOPT_REQUIRE_NATIVE", "1")
    guard.here |= change
    guard.missing = "" if change else said
    guard.counts[guard.name] = 1e9
    assert guard("--check") == 0
    assert f"left out: the budgets of cpu: {said}" in capsys.readouterr().out


def test_instructions_of_another_python_are_left_out(guard, capsys):
    guard.here["python"] = "3.12"
    guard.counts[guard.python] = 1e9
    assert guard("--check") == 0
    assert "left out: 1 budgets of cpu" in capsys.readouterr().out
    guard.counts[guard.name] = 1e9
    assert guard("--check") == 1


def test_writing_keeps_the_parts_that_were_not_counted(guard):
    other = "gpu adamw f32: launches"
    file = json.loads(guard.path.read_text())
    file["budgets"][other] = {"count": 2, "allowed": 2}
    budgets.PARTS["gpu"] = budgets.Part(("gpu ",), lambda: "needs g++", dict, False)
    guard.path.write_text(json.dumps(file))
    guard.counts = {guard.name: 50.0}
    assert guard("--write") == 0
    kept = budgets.read()["budgets"]
    assert kept == {guard.name: {"count": 50.0, "allowed": 51.5}, other: {"count": 2, "allowed": 2}}


def committed():
    return {name: row["count"] for name, row in budgets.read()["budgets"].items()}


def test_committed_budgets_allow_what_the_tolerances_say():
    for name, row in budgets.read()["budgets"].items():
        assert row["allowed"] == budgets.allowed(name, row["count"]), name


def test_no_loop_computes_a_float_at_a_time():
    scalars = {name: count for name, count in committed().items() if name.endswith(": scalar floats")}
    assert len(scalars) == len(loops.loops()) and not any(scalars.values())


STATES = {
    "sgd": 0,
    "sgd momentum": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "lion": 1,
    "rmsprop centered": 2,
    "rmsprop momentum": 2,
    "rmsprop centered momentum": 3,
    "adam": 2,
    "adamw": 2,
    "adam amsgrad": 3,
    "adamw amsgrad": 3,
}


def test_budgets_of_bytes_are_the_floors():
    """Parameter and gradient read, parameter written, each state read and written; what options add."""
    counts = committed()
    sizes = {"f32": 4, "bf16": 2, "f16": 2}
    for name in loops.RULES:
        for dtype, size in sizes.items():
            assert counts[f"loop {name} {dtype}: bytes each"] == size * (3 + 2 * STATES[name])
    for dtype, size in sizes.items():
        assert counts[f"loop norm pass {dtype}: bytes each"] == size
        assert counts[f"loop mse {dtype}: bytes each"] == 3 * size
        assert counts[f"loop cross entropy, largest {dtype}: bytes each"] == size
        assert counts[f"loop cross entropy, backward {dtype}: bytes each"] == 2 * size
    floors = {
        "adamw f32": 28,
        "adamw bf16": 14,
        "adamw f32 and bf16": 21,
        "adamw amsgrad f32": 36,
        "adamw f32, max_norm": 32,
        "adamw f32, ema": 36,
        "adamw f32, max_norm, ema": 40,
        "adamw bf16, master": 18,
        "lamb f32": 44,
        "adagrad f32": 20,
        "rmsprop f32": 20,
        "sgd momentum f32": 20,
        "lion f32": 20,
    }
    for name, floor in floors.items():
        assert sum(counts[f"gpu {name}: bytes {how} each"] for how in ("read", "written")) == floor, name
    # two codes and their scales, one for 256 codes; every thread of a warp asks for them
    assert counts["gpu adamw f32, 8-bit: bytes read each"] == 4 + 4 + 2 * (1 + 4 * 32 / 256)
    assert counts["gpu adamw f32, 8-bit: bytes written each"] == pytest.approx(4 + 2 * (1 + 4 / 256), abs=1e-4)
    for dtype, size in (("f32", 4), ("bf16", 2)):
        for how in ("", "inplace "):
            moved = sum(counts[f"gpu cross entropy {how}{dtype}: bytes {way} each"] for way in ("read", "written"))
            assert 2 * size <= moved < 2 * size * 1.001  # the label's logit twice


# --- callgrind ---

CALLGRIND = """\
# callgrind format
version: 1
part: 7

desc: Timerange: Basic block 0 - 49462
desc: Trigger: Client Request: adamw f32|8192

positions: line
events: Ir
summary: 1234

ob=/site/fusedopt/_native.cpython-311-x86_64-linux-gnu.so
fl=csrc/cpu/step.cpp
fn=void fusedopt::avx2::(anonymous namespace)::step_span<fusedopt::avx2::AdamW, float>(fusedopt::Launch const&)
0 700
cfi=element.h
cfn=fusedopt::avx2::load(float)
calls=3 0
0 9999
fi=rules.h
0 50
fe=csrc/cpu/step.cpp
0

ob=/usr/lib/libc.so.6
fl=malloc.c
fn=malloc
0 34

totals: 784
"""


def test_callgrind_files_are_read():
    part = callgrind.parse(CALLGRIND.splitlines(keepends=True))
    kernel, malloc = part.own
    assert (part.work, part.size) == ("adamw f32", 8192)
    assert part.own == {kernel: 750, malloc: 34}
    assert callgrind.KERNEL.search(kernel[1]) and callgrind.NATIVE.search(kernel[0])
    assert malloc[1] == "malloc" and callgrind.C_LIBRARY.search(malloc[0])
    assert callgrind.parse(["desc: Trigger: Program termination\n", "fn=main\n", "0 1\n"]) is None


def test_counts_are_free_of_what_a_call_costs():
    """Of two sizes, made up: 3 instructions an element, 200 a tensor, 500 a call."""
    from benchmarks.counting.watched import work

    native, python = "/site/fusedopt/_native.so", "/lib/libpython3.11.so"
    parts = []
    for kind in work():
        for size in kind.sizes:
            n = size * kind.units
            own = {
                (native, "void fusedopt::avx2::(anonymous namespace)::step_span<>(int)"): 3 * n,
                (native, "double fusedopt::avx2::(anonymous namespace)::sum_squares<float>(void const*, long)"): n,
                (native, "fusedopt::Table::gather()"): 500 + 200 * n * (kind.of == "host"),
                (python, "_PyEval_EvalFrameDefault"): 1000 + 7 * n,
                ("/usr/lib/libc.so.6", "malloc_consolidate"): size % 977,
            }
            parts.append(callgrind.Part(kind.name, size, own))
    counts = callgrind.counts(parts)
    assert counts["cpu adamw f32: an element"] == 4
    assert counts["cpu adamw f32: a call"] == 500
    assert counts["cpu norm pass bf16: an element"] == 1
    assert counts["cpu cross entropy f32: a logit"] == 4
    assert counts["host, nothing changed: a tensor, native"] == 200
    assert counts["host, nothing changed: a tensor, native, Python and torch"] == 207
    assert counts["host, nothing changed: a call, native, Python and torch"] == 1500
    assert counts.keys() == {name for name in committed() if name.startswith(budgets.PARTS["cpu"].prefixes)}


# --- disassembly ---

# Two elements' worth of vectors a turn, entered once more by a rarely taken block, and a loop over single elements.
OBJDUMP = """
lib.so:     file format elf64-x86-64

0000000000001000 <void fusedopt::avx512::(anonymous namespace)::step_span<fusedopt::avx512::SGD, float>(int)>:
    1000:\txor    %eax,%eax
    1004:\tvbroadcastss %xmm1,%zmm18
    100a:\tcmp    $0x1f,%rdi
    100e:\tjle    1060 <void fusedopt::avx512::step_span+0x60>
    1014:\tvmovups (%rbx,%rax,1),%zmm0
    101b:\tvmulps 0x40(%rbx,%rax,1),%zmm18,%zmm1
    1022:\tvfmadd231ps (%r9,%rax,1),%zmm0,%zmm1
    1029:\tvmovups -0x28(%rbp),%zmm3
    1030:\tvmovups %zmm0,(%r9,%rax,1)
    1037:\tvmovups %zmm1,0x40(%r9,%rax,1)
    103e:\tsub    $0xffffffffffffff80,%rax
    1042:\tcmp    %rax,%rcx
    1046:\tjg     1004 <void fusedopt::avx512::step_span+0x4>
    104c:\tret
    1060:\tvmovss (%rbx,%rax,1),%xmm0
    1064:\tvmulss %xmm0,%xmm1,%xmm0
    1068:\tadd    $0x4,%rax
    106c:\tcmp    %rax,%rdi
    1070:\tjg     1060 <void fusedopt::avx512::step_span+0x60>
    1074:\tjmp    103e <void fusedopt::avx512::step_span+0x3e>

0000000000002000 <fusedopt::avx512::cpu_step(int)>:
    2000:\tret
"""


def listed(text):
    return list(disassembly.functions(text.splitlines(keepends=True), re.compile("fusedopt::avx512::")))


def test_the_turn_with_the_vectors_is_counted():
    (name, code), (_, short) = listed(OBJDUMP)
    assert loops.short(name) == "void step_span<SGD, float>(int)"
    turn = disassembly.hottest(code)
    assert turn == disassembly.Turn(
        instructions=12, vectors=7, scalars=0, divisions=0, loaded=192, stored=128, advance=128
    )
    assert disassembly.hottest(short) is None


def test_divisions_are_told_apart():
    """One instruction more is allowed, since compilers differ by it; but not one that takes as long as a dozen."""
    text = OBJDUMP.replace("vmovups -0x28(%rbp),%zmm3", "vsqrtps %zmm1,%zmm1\n    102f:\tvdivps %zmm1,%zmm0,%zmm0")
    assert disassembly.hottest(listed(text)[0][1]).divisions == 2


@pytest.mark.parametrize(
    ("instruction", "loaded", "stored", "scalars"),
    [
        ("vmulss (%rbx,%rax,1),%xmm0,%xmm0", 4, 0, 1),
        ("vmovsd %xmm0,(%rbx,%rax,1)", 0, 8, 1),
        ("vcomiss %xmm0,%xmm1", 0, 0, 0),
        ("vpmovzxwd (%rbx,%rax,1),%zmm0", 32, 0, 0),
        ("vpmovsxbd (%rbx,%rax,1),%zmm0", 16, 0, 0),
        ("vcvtps2ph $0x4,%zmm0,(%rbx,%rax,1)", 0, 32, 0),
        ("vpmovdb %zmm0,(%rbx,%rax,1)", 0, 16, 0),
        ("vbroadcastss (%rbx,%rax,1),%zmm0", 0, 0, 0),
        ("vmulps 0x10(%rip){1to16},%zmm0,%zmm0", 0, 0, 0),
        ("vmovups (%r9,%rax,1),%zmm0", 0, 0, 0),  # read already: once is once
        ("prefetchw 0x800(%rbx,%rax,1)", 0, 0, 0),
    ],
)
def test_operands(instruction, loaded, stored, scalars):
    text = OBJDUMP.replace("vmovups -0x28(%rbp),%zmm3", instruction)
    text = text.replace("(%rbx,%rax,1),%zmm0\n    101b", "0x80(%r9,%rax,1),%zmm0\n    101b")
    text = text.replace("vmulps 0x40(%rbx,%rax,1)", "vmulps 0xc0(%r9,%rax,1)")
    turn = disassembly.hottest(listed(text)[0][1])
    assert (turn.loaded - 192, turn.stored - 128, turn.scalars) == (loaded, stored, scalars)


# --- micro cases ---


def test_micro_cases_run():
    """Once each, untimed; pytest finds them only where it is asked for benchmarks/micro."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks/micro", "--benchmark-disable", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1]), done.stdout
