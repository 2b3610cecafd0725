"""`python -m fusedopt`, and what an installation without a compiler does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fusedopt
import fusedopt.__main__ as report
from fusedopt import _native, backends
from fusedopt.backends import cpu

ROOT = Path(__file__).parent.parent


def test_text_report(capsys):
    assert report.main([]) == 0
    text = capsys.readouterr().out
    assert fusedopt.__version__ in text and cpu.isa() in text
    assert re.search(r"^  cpu +on$", text, re.M)
    assert re.search(r"^  cuda +off: .+\n +remedy: .+$", text, re.M)
    assert re.search(r"self-test (\d+) of \1 agree", text)


def test_json_report(capsys):
    started = time.perf_counter()
    assert report.main(["--json"]) == 0
    assert time.perf_counter() - started < 20  # "a second or two", on a machine that does other things as well
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] and data["cpu"]["instruction_set"] == cpu.isa()
    assert {name: entry["on"] for name, entry in data["backends"].items()} == {
        name: state is True for name, state in backends.available().items()
    }
    assert {row["test"] for row in data["self_test"]} == {
        "Adam",
        "AdamW",
        "RMSprop",
        "Adagrad",
        "SGD",
        "Lion",
        "cross_entropy",
    }


def test_a_wrong_kernel_fails_the_self_test(monkeypatch, capsys):
    step = cpu.step

    def off_by_a_percent(table, groups):
        return step(table, [([hyper[0] * 1.01, *hyper[1:]], factor) for hyper, factor in groups])

    monkeypatch.setattr(cpu, "step", off_by_a_percent)
    assert report.main([]) == 1
    assert "FAILED  AdamW float32" in capsys.readouterr().out


@pytest.mark.parametrize("isa", [*_native.cpu_isas(), "sse9"])
def test_fusedopt_cpu_forces_an_instruction_set(isa):
    run = subprocess.run(
        [sys.executable, "-m", "fusedopt", "--json"],
        env={**os.environ, "FUSEDOPT_CPU": isa},
        capture_output=True,
        text=True,
    )
    data = json.loads(run.stdout)
    if isa == "sse9":
        assert "FUSEDOPT_CPU='sse9' is not one of" in data["backends"]["cpu"]["reason"]
        assert "unset" in data["backends"]["cpu"]["remedy"]
    else:
        assert data["cpu"]["instruction_set"] == isa
    assert data["ok"] and run.returncode == 0, run.stdout  # without kernels, torch's own run


def test_build_without_a_compiler_says_so_and_succeeds(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copytree(ROOT / "fusedopt", source / "fusedopt", ignore=shutil.ignore_patterns("*.so", "_build_info.json"))
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "FUSEDOPT_REQUIRE_NATIVE")} | {
        "PATH": "/nowhere"
    }
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no C++ compiler was found" in run.stderr and "apt install g++" in run.stderr
    strict = subprocess.run(
        build, cwd=source, env=environment | {"FUSEDOPT_REQUIRE_NATIVE": "1"}, capture_output=True, text=True
    )
    assert strict.returncode != 0

    # an editable installation's finder would lend its native library to this copy
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "import fusedopt.__main__ as m; sys.exit(m.main(['--json']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
    )
    data = json.loads(run.stdout)
    assert "no C++ compiler was found" in data["backends"]["cpu"]["reason"]
    assert "apt install g++" in data["backends"]["cpu"]["remedy"]
    assert data["ok"], data["self_test"]


def test_setup_never_imports_torch():
    sources = (ROOT / "setup.py").read_text(), (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^\s*(import|from) torch", sources[0], re.M)
    assert "torch" not in re.search(r"\[build-system\].*?\n\n", sources[1], re.S).group()
    included = {
        line for path in (ROOT / "csrc").rglob("*.*") for line in re.findall(r"#include\s+(\S+)", path.read_text())
    }
    assert not [name for name in included if re.search(r"torch|ATen|c10", name)]
