"""The CUDA sources themselves, run on the CPU: g++ compiles them against tests/simt, the engine steps through them."""

import re
import sys

import pytest
from simt import build

thorough = pytest.mark.thorough


def run(kind, script, *arguments, order="forward"):
    if reason := build.missing(kind):
        pytest.skip(f"left out, the CUDA sources were not run on the CPU ({kind}): {reason}")
    command = [sys.executable, build.ROOT / "tests/simt" / script, build.build(kind, "_native.so"), *arguments]
    return build.run(kind, command, FUSEDOPT_SIMT_ORDER=order)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "order", "table", "tensors"),
    [
        ("plain", "forward", "full", 6000),
        ("plain", "reverse", "few", 200),
        ("plain", "seed:1", "few", 200),
        ("plain", "seed:2", "few", 200),
        pytest.param("asan", "seed:3", "few", 200, marks=thorough),
        pytest.param("tsan", "seed:3", "few", 200, marks=thorough),
    ],
)
def test_no_further_from_float64_than_stock(kind, order, table, tensors):
    done = run(kind, "optimizers.py", table, order=order)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) tensors agree", done.stdout)[1]) > tensors


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "order", "table", "losses"),
    [
        ("plain", "forward", "full", 250),
        ("plain", "reverse", "few", 200),
        ("plain", "seed:1", "full", 250),
        pytest.param("asan", "seed:3", "full", 250, marks=thorough),
        pytest.param("tsan", "seed:3", "few", 200, marks=thorough),
    ],
)
def test_cross_entropy_as_in_float64(kind, order, table, losses):
    done = run(kind, "cross_entropy.py", table, order=order)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) losses agree", done.stdout)[1]) > losses


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "order", "table"),
    [
        ("plain", "forward", "full"),
        ("plain", "reverse", "few"),
        ("plain", "seed:1", "few"),
        pytest.param("asan", "seed:3", "few", marks=thorough),
        pytest.param("tsan", "seed:3", "few", marks=thorough),
    ],
)
def test_mse_as_in_float64(kind, order, table):
    done = run(kind, "mse.py", table, order=order)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) losses agree", done.stdout)[1]) > 150


@pytest.mark.timeout(900)
def test_clipping_as_on_the_cpu():
    done = run("plain", "clip.py")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) tensors agree", done.stdout)[1]) > 400


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "order", "table", "tensors"),
    [
        ("plain", "forward", "full", 15000),
        ("plain", "reverse", "few", 200),
        ("plain", "seed:1", "few", 200),
        pytest.param("asan", "seed:3", "few", 200, marks=thorough),
        pytest.param("tsan", "seed:3", "few", 200, marks=thorough),
    ],
)
def test_precision_as_on_the_cpu(kind, order, table, tensors):
    done = run(kind, "precision.py", table, order=order)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) tensors agree", done.stdout)[1]) > tensors


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "order", "table", "tensors"),
    [
        ("plain", "forward", "full", 5000),
        ("plain", "reverse", "few", 200),
        ("plain", "seed:1", "few", 200),
        pytest.param("asan", "seed:3", "few", 200, marks=thorough),
        pytest.param("tsan", "seed:3", "few", 200, marks=thorough),
    ],
)
def test_lamb_as_on_the_cpu(kind, order, table, tensors):
    done = run(kind, "lamb.py", table, order=order)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) tensors agree", done.stdout)[1]) > tensors


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["plain", pytest.param("asan", marks=thorough)])
def test_a_failed_launch_is_told_and_loses_only_what_it_says(kind):
    done = run(kind, "failures.py")
    assert (done.returncode, done.stdout) == (0, "every failure is told\n")


def test_what_the_simulated_gpu_finds_is_raised():
    done = run("plain", "optimizers.py", "few", order="sideways")
    assert done.returncode == 1
    assert "RuntimeError: FUSEDOPT_SIMT_ORDER=sideways is not forward, reverse or seed:N" in done.stdout
