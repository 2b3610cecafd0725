"""The simulated GPU itself (tests/simt): it computes what CUDA computes, and finds what it is there to find.

Each case is a kernel of tests/simt/selftest.cu, run in a process of its own.
"""

import functools
import re

import pytest
from simt import build

ORDERS = ["forward", "reverse", "seed:1", "seed:2"]
SOURCE = build.ROOT / "tests/simt/selftest.cu"


@functools.cache
def program(kind):
    if reason := build.missing(kind):
        pytest.skip(f"left out, the simulated GPU ({kind}): {reason}")
    return build.build(kind, "selftest")


def outcome(kind, case, order="forward"):
    return build.run(kind, [program(kind), case, order])


def lines_of(case):
    """Where the defects of a case stand."""
    lines = SOURCE.read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if re.search(rf"// defect: .*\b{case}\b", line)]


def assert_found(run, case, *messages):
    assert run.returncode != 0, run.stdout
    places = [f"selftest.cu:{line}" for line in lines_of(case)]
    assert any(re.search(rf"{re.escape(place)}\b", run.stdout) for place in places), (places, run.stdout)
    for message in messages:
        assert re.search(message, run.stdout), run.stdout


@pytest.mark.parametrize("kind", list(build.KINDS))
@pytest.mark.parametrize(
    "case",
    ["reduction", "cluster", "votes", "atomics", "dynamic", "recovery", "launches", "injections"],
)
def test_right_in_every_order(kind, case):
    for order in ORDERS:
        run = outcome(kind, case, order)
        assert (run.returncode, run.stdout) == (0, "ok\n"), (order, run.stdout)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("divergent_exit", r"__syncthreads in leaves_early, .*: divergent barrier: .*has exited"),
        (
            "divergent_places",
            r"__syncthreads in two_barriers, .*: divergent barrier: others wait at \S+selftest.cu:\d+",
        ),
        ("divergent_cluster", r"cluster.sync in no_cluster_barrier, .*: divergent barrier: .*has exited"),
        (
            "deadlock",
            r"__shfl_xor_sync in half_shuffles, .*: deadlock:(?s:.*): __syncthreads: 32 wait, thread \(16,0,0\)",
        ),
        ("mask_mismatch", r"__ballot_sync in masks, .*: mask mismatch: its mask is \w{8}, that of lane \d+ is \w{8}"),
        ("exited_lane", r"__ballot_sync in lane_leaves, .*: lane 9 of its mask ffffffff has exited"),
        ("missing_lane", r"__ballot_sync in short_warp, .*: lane 16 of its mask ffffffff has exited"),
        ("not_in_mask", r"__syncwarp in others_only, .*: its lane \d+ is not in its mask fffffffe"),
        ("trap", r"__trap in traps, thread \(33,0,0\) of block \(0,0,0\): the kernel trapped"),
        ("cluster_end", r"map_shared_rank in .*: that block of the cluster has exited"),
    ],
)
def test_who_waits_in_vain_is_named(case, message, order):
    assert_found(outcome("plain", case, order), case, message)


@pytest.mark.parametrize("case", ["missing_barrier", "cluster_start", "cluster_late"])
def test_what_is_read_too_early_or_too_late_is_nan(case):
    """In one order at least."""
    found = [outcome("plain", case, order).stdout for order in ORDERS]
    assert any(re.search(r"wrong value: .* is -?nan, not", text) for text in found), found


@pytest.mark.parametrize("case", ["global_overrun", "shared_overrun", "dynamic_overrun"])
def test_asan_sees_overruns(case):
    assert_found(outcome("asan", case), case, "AddressSanitizer: heap-buffer-overflow")


def test_asan_sees_the_shared_memory_of_a_block_that_left():
    assert_found(outcome("asan", "cluster_late"), "cluster_late", "AddressSanitizer: use-after-poison")


@pytest.mark.parametrize("kind", ["plain", "asan"])
def test_ubsan_sees_misaligned_vectors(kind):
    assert_found(outcome(kind, "misaligned"), "misaligned", "misaligned address")


@pytest.mark.parametrize(
    "case", ["missing_barrier", "missing_loop_barrier", "missing_syncwarp", "cluster_start", "cluster_late"]
)
def test_tsan_sees_races(case):
    for order in ("forward", "seed:3"):
        assert_found(outcome("tsan", case, order), case, "ThreadSanitizer: data race")


def test_shared_memory_is_limited():
    message = r"shared some in much_shared, thread \(0,0,0\).*: more than 49152 bytes of shared memory in all"
    assert_found(outcome("plain", "too_much_shared"), "too_much_shared", message)


def test_an_order_that_is_none_is_refused():
    run = outcome("plain", "reduction", "backward")
    assert (run.returncode, run.stdout) == (2, "no such order\n")
