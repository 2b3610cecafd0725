"""Distributed benchmarks: a step split, bytes counted, the projection's arithmetic, rows and tables of a run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich"):
    pytest.importorskip(extra)
import torch.distributed as dist  # noqa: E402

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402
from torch.optim import AdamW  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    ddp,
    ddp_contenders,
    ddp_plot,
    ddp_report,
    ddp_split,
    machine,
    project,
    project_count,
    project_model,
    project_report,
    readme,
    store,
)
from benchmarks.ddp_collectives import Call, Collectives  # noqa: E402
from benchmarks.ddp_split import NO_COMMUNICATION, NO_OPTIMIZER  # noqa: E402

TINY = ddp_contenders.SIZES["tiny"]


# --- arithmetic ---


def test_the_slowest_rank_is_taken_whole():
    one = [[[1.0, 2.0, 0.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]]]  # (turns, contenders, phases)
    two = [[[2.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 9.0]]]
    np.testing.assert_equal(ddp_split.slowest(np.array([one, two])), [one[0], two[1]])


def test_a_step_is_split():
    times = {  # forward, backward, clip, optimizer; every second turn everything is slower by as much
        NO_OPTIMIZER: [10.0, 20.0, 0.0, 3.0],
        NO_COMMUNICATION: [8.0, 15.0, 0.0, 1.0],
        "stock": [10.0, 20.0, 0.0, 7.0],
        "stock, clip": [10.0, 20.0, 2.0, 8.0],
        "ours": [10.0, 20.0, 0.0, 4.0],
        "ours, clip": [10.0, 20.0, 0.0, 5.5],
    }
    turns = {name: np.array([phases, [2 * ms for ms in phases], phases]) for name, phases in times.items()}
    figures = ddp_split.split(turns, {"ours, clip"})
    assert figures["stock, clip"]["median_ms"] == 40
    assert figures["stock, clip"]["exposed_optimizer_ms"] == 7  # 40 - 33
    assert [figures["stock, clip"][f"{part}_ms"] for part in ddp_split.PARTS] == [8, 15, 9, 2, 6]  # comm: 33 - 24
    assert [figures["ours, clip"][f"{part}_ms"] for part in ddp_split.PARTS] == [8, 15, 9, 1.5, 2]
    assert [figures["ours"][f"{part}_ms"] for part in ddp_split.PARTS] == [8, 15, 9, 0, 2]
    assert [figures[NO_COMMUNICATION][f"{part}_ms"] for part in ddp_split.PARTS] == [8, 15, 0, 0, 1]
    assert "exposed_optimizer_ms" not in figures[NO_OPTIMIZER]
    assert figures["ours"]["exposed_p20_ms"] == 1 and figures["ours"]["exposed_p80_ms"] > 1
    for name in ("stock, clip", "ours, clip", "ours", NO_OPTIMIZER, NO_COMMUNICATION):
        parts = sum(figures[name][f"{part}_ms"] for part in ddp_split.PARTS)
        assert parts == figures[name]["median_ms"]
    assert ddp_split.overlap(2.0, 8.0) == 0.75


@pytest.mark.parametrize(
    ("kind", "ranks", "sent"),
    [
        ("all-reduce", 4, 1500),
        ("all-reduce", 2, 1000),
        ("all-gather", 4, 750),
        ("reduce-scatter", 8, 875),
        ("broadcast", 2, 500),
        ("all-reduce", 1, 0),
    ],
)
def test_bytes_sent_by_the_ring_convention(kind, ranks, sent):
    assert Call(kind, 1000, ranks).sent == sent


def test_cases_of_a_run():
    names = [plan.name for plan in ddp.plans(4, scaling=True, batch=4, cases="zero1")]
    assert names == ["zero1-1-weak", "zero1-2-weak", "zero1-4-weak", "zero1-2-strong", "zero1-4-strong"]
    assert [plan.name for plan in ddp.plans(3, scaling=False, batch=4, cases="fsdp2-3")] == ["fsdp2-3-weak"]
    assert not [plan for plan in ddp.plans(3, True, 4, "") if plan.name.endswith("3-strong")]  # 3 does not divide 4


# --- collectives, under the fake process group ---


def test_counted_as_comm_debug_mode_counts_and_with_bytes():
    with project_count.fake_ranks(4):
        mesh = init_device_mesh("cpu", (4,))
        model = TINY.model()
        parameters = sum(p.numel() for p in model.parameters())
        root = parameters - sum(p.numel() for p in model.blocks.parameters())
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        tokens = torch.zeros(1, 9, dtype=torch.int64)
        with CommDebugMode() as theirs, Collectives() as ours:
            project_count.backward(model, tokens)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert sum(theirs.get_comm_counts().values()) == len(ours.calls)
    assert {call.ranks for call in ours.calls} == {4}
    totals = {kind: nbytes for kind, (_, nbytes) in ddp.summed(ours.calls).items()}
    small = totals.pop("all-reduce")
    assert small <= 4 * len(list(model.parameters()))  # of the norm
    # FSDP2 keeps what the outermost module holds; blocks are gathered again for backward. 4 divides every size
    assert totals == {"all-gather": 4 * (2 * parameters - root), "reduce-scatter": 4 * parameters}


def test_a_collective_that_is_not_known_is_refused():
    with project_count.fake_ranks(2), pytest.raises(RuntimeError, match="cannot count: scatter_"), Collectives():
        dist.scatter(torch.zeros(1), [torch.zeros(1), torch.zeros(1)])


def test_projected_bytes_of_a_small_model_are_those_of_the_hand():
    shape = project_count.Shape(layers=4, hidden=128, vocab=256, seq=64)
    counted, fullest = project_count.count(shape, world=8, per_node=4)
    sizes = shape.sizes()
    blocks = sum(sizes) - sum(p.numel() for n, p in shape.model().named_parameters() if not n.startswith("blocks"))
    whole = 4 * sum(sizes)
    assert (counted["DDP"].reduced, counted["DDP"].moved) == (whole, 0)
    assert (counted["ZeRO-1"].reduced, counted["ZeRO-1"].moved) == (whole, whole)
    assert (counted["FSDP2"].reduced, counted["FSDP2"].moved) == (0, 2 * whole + 4 * blocks)
    assert (counted["HSDP"].reduced, counted["HSDP"].moved) == (whole / 4, 2 * whole + 4 * blocks)
    # a gather twice and a scatter for each block, once each for the rest
    assert counted["FSDP2"].calls == 3 * 4 + 2 and counted["FSDP2"].norm_calls == 1
    assert fullest == project_model.fullest(sizes, 8)[0]


# --- the projection's arithmetic ---


class Bytes(TorchDispatchMode):
    """Of every operation's tensors: read once each, and written where its schema says so or where they are new."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = tensors(args)
        written = tensors([v for v, a in zip(args, func._schema.arguments, strict=False) if a.alias_info])
        made = {key: size for key, size in tensors(result).items() if key not in read}
        self.total += sum(read.values()) + sum(written.values()) + sum(made.values())
        return result


def tensors(values) -> dict[int, int]:
    """id -> bytes of those that are no single numbers."""
    return {id(t): t.nbytes for t in tree_leaves(values) if torch.is_tensor(t) and t.ndim}


def test_bytes_of_torchs_foreach_step_are_counted():
    p = torch.randn(1000, requires_grad=True)
    p.grad = torch.randn(1000)
    optimizer = AdamW([p], foreach=True)
    optimizer.step()
    with Bytes() as counted:
        optimizer.step()
    assert counted.total == 1000 * project_model.STEP_BYTES["torch foreach"]
    params = [p]
    with Bytes() as counted:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    clip = 1000 * project_model.CLIP_BYTES["torch foreach"]
    assert clip <= counted.total < clip + 64  # and the norm itself


def test_what_a_rank_steps():
    sizes = [100, 60, 50, 10, 10]
    assert project_model.fullest(sizes, 1) == (230, 5)
    assert project_model.fullest(sizes, 2) == (120, 3)  # 100 + 10 + 10, 60 + 50
    assert project_model.fullest(sizes, 8) == (100, 1)
    assert project_model.share("DDP", sizes, 8, 4) == (230, 5)
    assert project_model.share("FSDP2", sizes, 8, 4) == (29, 5)
    assert project_model.share("HSDP", sizes, 8, 4) == (58, 5)


def test_times_of_the_projection_by_hand():
    given = project_model.Assumptions(hbm=1e9, intra=100.0, inter=10.0, flops=1e6, utilization=0.5, latency=1e-3,
                                      ranks_per_node=4, tokens=2)  # fmt: skip
    counted = project_model.Counted(reduced=400.0, moved=800.0, norm_calls=2)
    # DDP within a node: 2 * 3/4 of what is reduced; over nodes at 4 adapters' speed together
    assert project_model.communication("DDP", 4, given, project_model.Counted(reduced=400.0)) == pytest.approx(6.0)
    assert project_model.communication("FSDP2", 8, given, project_model.Counted(moved=800.0)) == pytest.approx(17.5)
    # HSDP: 3/4 of 800 at 100, and 2 * 1/2 of 400 at 10
    assert project_model.communication("HSDP", 8, given, counted) == pytest.approx(6 + 40)
    halved = project_model.Assumptions(intra=100.0, dtype_bytes=2.0)
    assert project_model.communication("DDP", 4, halved, project_model.Counted(reduced=400.0)) == pytest.approx(3.0)
    assert project_model.step(100, 5.0, 1e-3, given) == pytest.approx(6 * 100 * 2 / 5e5 + 5)
    assert project_model.step(100, 5.0, 9.0, given) == pytest.approx(14.0)

    sizes = [600_000, 400_000]
    host = project_model.Host({"torch fused": 1.0, "fusedopt": 1.0}, {"torch fused": 1e4, "fusedopt": 1.0})
    # bound by memory: 40 and 32 bytes of a million parameters at 1e9 per second; small all-reduces: 2 * log2 hops each
    assert project_model.exposed("DDP", "torch fused", sizes, 4, given, host, counted) == pytest.approx(0.040)
    assert project_model.exposed("DDP", "fusedopt", sizes, 4, given, host, counted) == pytest.approx(0.032)
    assert project_model.exposed("FSDP2", "fusedopt", sizes, 4, given, host, counted) == pytest.approx(0.008 + 0.004)
    # bound by its host: 2 tensors of 10 ms, 2 all-reduces for the norm
    assert project_model.exposed("FSDP2", "torch fused", sizes, 4, given, host, counted) == pytest.approx(0.020 + 0.008)
    assert project_model.predicted_on_cpu(28e6, 7.0, 0.5) == pytest.approx(4.5)  # ms, GB/s


def test_bad_sizes_of_a_projection_are_named():
    ask = command.parser().parse_args
    for words, told in (
        (["--layers", "3"], "--hidden"),
        (["--layers", "3", "--hidden", "100"], "multiple of 128"),
        (["--world", "12"], "whole nodes"),
    ):
        with pytest.raises(SystemExit, match=told):
            project.shape_of(ask(["project", *words]))
    assert project.shape_of(ask(["project", "--params", "7e9"])) == project_count.Shape(32, 4096)


# --- a case, in this process ---


@contextlib.contextmanager
def alone():
    """A gloo group of this process."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.new_group([0]), dist.new_group([0], backend="fake")
    finally:
        dist.destroy_process_group()


def raises(params, **kwargs):
    raise TypeError("no such optimizer")


def test_wrong_contenders_are_marked_and_what_raised_is_a_row(monkeypatch):
    makes = dict(ddp_contenders.OPTIMIZERS)
    makes |= {"mistaken": partial(AdamW, lr=ddp_contenders.LR * 1.01), "raising": raises}
    monkeypatch.setattr(ddp_contenders, "OPTIMIZERS", makes)
    told = []
    with alone() as (group, fake):
        for wrapping in ("ddp-view", "fsdp2"):
            plan = ddp.Plan(wrapping, 1, "weak")
            case = ddp.Case(plan, "tiny", TINY, ddp.Turns(0, 2), group, fake, torch.device("cpu"), {}, told.append)
            rows = {row["contender"]: row for row in case.measure()}
            json.dumps(list(rows.values()), allow_nan=False)
            assert len(rows) == 2 + 2 * len(makes)
            for name, row in rows.items():
                expected = {"mistaken": "wrong", "raising": "raised TypeError: no such optimizer"}
                assert row["verdict"] == expected.get(name.removesuffix(", clip"), "ok"), (name, row)
                if "raising" not in name:
                    assert row["median_ms"] > 0 and row["peak_mib"] > 0 and row["host_ms"] > 0
    assert any("oracle" in text for text in told)


# --- tables and plots ---


def row(wrapping: str, contender: str, ranks: int = 2, scaling: str = "weak", **more) -> dict:
    made = {"case": f"{wrapping}-{ranks}-{scaling}", "contender": contender, "wrapping": wrapping, "ranks": ranks}
    made |= {"scaling": scaling, "parameters": 1_000_000, "tensors": 50, "tokens_per_rank": 256, "median_ms": 40.0}
    made |= {"p20_ms": 39.0, "p80_ms": 42.0, "forward_ms": 8.0, "backward_ms": 15.0, "communication_ms": 9.0}
    made |= {"clip_ms": 2.0, "optimizer_ms": 6.0, "host_ms": 0.5, "tokens_per_s": 6400.0 / ranks, "peak_mib": 20.0}
    made |= {"communication_alone_ms": 12.0, "overlap": 0.25, "collectives": {"all-reduce": [2, 4_000_000]}}
    made |= {"sent_bytes": 4_000_000, "local_parameters": 1_000_000, "stream_gb_per_s": 10.0, "error": 1e-5}
    if contender not in (NO_OPTIMIZER, NO_COMMUNICATION):
        made |= {"exposed_optimizer_ms": 7.0, "exposed_p20_ms": 6.0, "exposed_p80_ms": 8.0}
    return made | {"verdict": "ok"} | more | machine.environment()


@pytest.fixture
def folder(tmp_path):
    names = [NO_OPTIMIZER, NO_COMMUNICATION]
    names += [name + clip for name in ddp_report.OPTIMIZERS for clip in ("", ", clip")]
    rows = [row("ddp-view", name, ranks, "weak") for ranks in (1, 2) for name in names]
    rows += [row("ddp-view", name, 2, "strong") for name in names]
    rows[len(names) + 2] |= {"verdict": "wrong"}  # torch default on two ranks
    raised = row("ddp-view", "torch foreach")
    for key in [key for key in raised if key.endswith("_ms")]:
        raised.pop(key)
    rows[len(names) + 4] = raised | {"verdict": "raised RuntimeError: [this] and that"}
    store.merge(tmp_path / "ddp.jsonl", rows, [])
    return tmp_path


def test_readme_block_and_plot_of_rows(folder):
    ddp_plot.draw(folder)
    page = folder / "README.md"
    page.write_text("<!-- benchmarks:ddp -->\n<!-- /benchmarks:ddp -->\n")
    text = readme.regenerated(page, [folder])
    assert "not the speed of a network" in text
    assert "| DDP, bucket views | no | 40.0 ms | 7.00 ms, 18% (**wrong**) | raised RuntimeError |" in text
    split = "| DDP, bucket views | fusedopt | 40.0 (39.0 to 42.0) | 8.00 | 15.00 | 9.00 | 2.00 | 6.00 | 0.50 | 3,200 |"
    assert split in text
    assert "| DDP, bucket views | 2 x, 4.00 MB |  |  |  | 4.00 MB | 9.0 of 12.0 ms | 25% | 0 | 0 |" in text
    assert "| DDP, bucket views | fusedopt | 6,400 (100%) | 3,200 (50%) | 3,200 (50%) |" in text
    assert "`python -m benchmarks ddp --scaling`" in text and f"{folder.name}/ddp.png)" not in text
    assert "](ddp.png)" in text or "](./ddp.png)" in text
    assert (folder / "ddp.png").read_bytes().startswith(b"\x89PNG")


def test_terminal_tells_what_was_raised(folder, capsys):
    from rich.console import Console

    Console(width=200).print(ddp_report.terminal("ddp", store.read(folder / "ddp.jsonl")))
    text = capsys.readouterr().out
    assert "raised RuntimeError: [this] and that" in text
    assert "2 all-reduces of 4.00 MB; 4.00 MB sent per rank" in text


def test_projection_from_rows(folder, monkeypatch):
    """The command, but for the counting and timing, which have tests of their own."""
    counted = {name: project_model.Counted(4e9, 8e9, 10, 1) for name in project_model.WRAPPINGS}
    shape = project_count.Shape(32, 4096)
    zero = project_model.fullest(shape.sizes(), 256)[0]
    host = project_model.Host(*(dict.fromkeys(project_model.CONTENDERS, 5.0) for _ in range(2)))
    monkeypatch.setattr(project_count, "count", lambda *args: (counted, zero))
    monkeypatch.setattr(project_count, "host_times", lambda: host)
    assert command.main(["project", "--params", "7e9", "--out", str(folder)]) == 0
    main, checks = project_report.parted(store.read(folder / "project.jsonl"))
    assert len(main) == 12
    assert main[0]["parameters"] == pytest.approx(7e9, rel=1e-6)
    assert main[0]["sent_bytes_per_parameter"] == pytest.approx(
        (4e9 * 2 + 8e9) * 255 / 256 / sum(shape.sizes()), rel=1e-3
    )
    told = {(one["contender"], one["ranks"]): one for one in checks}
    # 28 bytes of a million parameters at 10 GB/s and 0.5 ms of host time; with clipping 32
    assert told["fusedopt", 2]["predicted_ms"] == pytest.approx(3.3)
    assert told["fusedopt, clip", 1]["predicted_ms"] == pytest.approx(3.7)
    assert told["fusedopt", 2]["off"] == pytest.approx(3.3 / 7 - 1, abs=1e-3)
    assert ("torch foreach", 2) not in told  # it has raised
    text = project_report.block(folder, "shown")
    assert "nothing in it was measured on a GPU" in text and "| FSDP2 | fusedopt | 10 | 1 |" in text
    assert "figures measured on this CPU" in text
    assert (folder / "project.png").read_bytes().startswith(b"\x89PNG")


# --- real processes ---


def test_two_ranks_measure_a_case(tmp_path):
    """As a user calls it: it starts its ranks, and tells."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "ddp", "--quick", "--cases", "zero1-2", "--out", str(tmp_path)],
        cwd=machine.ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = {one["contender"]: one for one in store.read(tmp_path / "ddp.jsonl")}
    assert {one["verdict"] for one in rows.values()} == {"ok"} and len(rows) == 10
    parameters = rows[NO_OPTIMIZER]["parameters"]
    for name, one in rows.items():
        moved = {kind: nbytes for kind, (_, nbytes) in one["collectives"].items()}
        if name == NO_COMMUNICATION:
            assert moved == {}
        else:
            small = moved["all-reduce"] - 4 * parameters  # ours adds its norm over the ranks, stock has it on each
            assert (0 < small <= 16) if name == "fusedopt, clip" else small == 0
            assert moved["broadcast"] == 4 * parameters
        assert parameters / 2 <= one["local_parameters"] < parameters
        assert one["ranks"] == 2 and one["machine"] == machine.cpu_model()
    assert "ZeRO-1, 2 ranks" in run.stdout and (tmp_path / "ddp.png").exists()


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the rank in /proc")
def test_a_rank_that_dies_ends_the_others_and_what_was_measured_stays(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "ddp", "--quick", "--scaling", "--out", str(tmp_path)],
        cwd=machine.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "ddp.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(second_rank(str(tmp_path)), signal.SIGKILL)
        _, told = run.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode != 0
    assert "what they measured is kept" in told
    assert store.read(tmp_path / "ddp.jsonl")


def second_rank(argument: str) -> int:
    """The process of rank 1 that has this among its arguments; torchrun gives its ranks sessions of their own."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            told = [Path(f"/proc/{entry}/{name}").read_bytes().split(b"\0") for name in ("cmdline", "environ")]
            if argument.encode() in told[0] and b"RANK=1" in told[1]:
                return int(entry)
    raise AssertionError("rank 1 is not there")
