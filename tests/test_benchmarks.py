"""The benchmarks' own machinery: rows are complete, wrong contenders are found, the README follows the data."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest
import torch
from torch.optim import AdamW

from benchmarks import __main__ as command
from benchmarks import (
    cases_loss,
    cases_optim,
    cases_optim_gpu,
    cases_step,
    ceilings,
    machine,
    page,
    plot,
    registry,
    report,
    run,
    runner,
    shapes,
    store,
    tables,
)
from fusedopt import optim as fused

KEYS = {
    *("case", "contender", "dtype", "cache", "median_ms", "p20_ms", "p80_ms", "repeats", "bytes", "gb_per_s"),
    *("ceiling", "ceiling_ms", "ceiling_fraction", "peak_mib", "error", "stock_error", "error_limit", "verdict"),
    *("machine", "cores", "threads", "instruction_set", "allocator", "torch", "fusedopt", "python", "commit"),
    *("date", "quick"),
}
CASE = "2000x64"
STOCK_IS_WRONG = {"sgd-momentum-gpt2-small-bf16": {"torch fused"}}  # its momentum buffer is another
README = """# A page
<!-- benchmarks:optim -->
<!-- /benchmarks:optim -->
between
<!-- benchmarks:install -->
old
<!-- /benchmarks:install -->
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A quick run of the smallest case, as a user makes it."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.MODELS, CASE, [(64,)] * 200)
        assert command.main(["optim", "--quick", "--cases", CASE, "--peers", "torch ", "--out", str(folder)]) == 0
    return folder


def test_a_run_writes_complete_rows_plot_and_report(results):
    header = json.loads((results / "optim.jsonl").read_text().splitlines()[0])
    assert header["suite"] == "optim"
    cases = tables.by_case(store.read(results / "optim.jsonl"))
    assert {name: next(iter(rows.values()))["cache"] for name, rows in cases.items()} == {
        "adamw-2000x64-f32": "warm",
        "adamw-2000x64-f32-cold": "cold",
    }
    for rows in cases.values():
        assert list(rows) == ["torch fused", "torch default", "torch foreach", "fusedopt", "stream"]
        for row in rows.values():
            assert set(row) - {"absent"} == KEYS  # of peers, where there are any
            assert row["verdict"] == "ok"
            assert row["bytes"] == 200 * 64 * 28
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            rounding = 5e-5 / row["median_ms"] + 5e-4 / row["gb_per_s"]  # both are written to so many digits
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] * 1e-6, rel=rounding)
    assert (results / "optim.png").read_bytes().startswith(b"\x89PNG")
    page_text = (results / page.NAME).read_text()
    for row in cases["adamw-2000x64-f32"].values():
        assert f"| {row['contender']} | " in page_text and tables.fraction(row) in page_text


def measured(case: runner.Case) -> dict[str, dict]:
    rows = []
    runner.measure(case, quick=True, keep=rows.extend)
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [(AdamW, {"lr": 1.1e-3}), (fused.AdamW, {"betas": (0.9, 0.9991)}), (AdamW, {"weight_decay": 0.0})],
)
def test_a_wrong_optimizer_is_marked(cls, wrong):
    builds = {"torch default": AdamW, "fusedopt": fused.AdamW, "mistaken": partial(cls, **wrong)}
    oracle = cases_optim.by_torch(AdamW)
    rows = measured(cases_optim.case("adamw", "3x300", "f32", 7, oracle, builds))
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {"torch default": "ok", "fusedopt": "ok", "stream": "ok", "mistaken": "wrong"}


@pytest.fixture
def small_models(monkeypatch):
    for name in shapes.MODELS:
        monkeypatch.setitem(shapes.MODELS, name, [(129, 65), (64,), (1,)])


@pytest.mark.usefixtures("small_models")
def test_whole_step_contenders_agree_with_their_oracle():
    for case in cases_step.cases():
        if case.device == "cpu" and "16m" not in case.name:  # its peers are slow
            assert {row["verdict"] for row in measured(case).values()} == {"ok"}, case.name


@pytest.mark.usefixtures("small_models")
def test_compiled_contenders_are_right(monkeypatch):
    """All of them but the compiling, which takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for module in (cases_optim, cases_step):
        monkeypatch.setattr(module, "compiler_here", lambda: True)
        case = next(case for case in module.cases() if case.name.endswith("adamw-gpt2-small-f32"))
        compiled = next(one for one in case.build(False) if one.name == "torch compiled")
        compiled.run()
        assert compiled.error() <= max(compiled.limit, case.limit)


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("name", ["rmsprop", "adagrad", "sgd", "lion", "adam-", "adamw"])
def test_every_registered_optimizer_agrees_with_its_oracle(name):
    cases = [case for case in cases_optim.cases() if case.name.startswith(name) and not case.sweep]
    assert cases
    for case in cases:
        wrong = {contender for contender, row in measured(case).items() if row["verdict"] != "ok"}
        assert wrong <= STOCK_IS_WRONG.get(case.name, set()), case.name


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_wrong_loss_is_marked(dtype):
    case = cases_loss.case(40, 1003, dtype, "installed")
    assert {row["verdict"] for row in measured(case).values()} == {"ok"}

    master = torch.randn(40, 1003).to(cases_loss.DTYPES[dtype])
    target = torch.randint(1003, (40,))

    def smoothed(logits, target):
        return torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.2)

    expected = cases_loss.oracle(master, target)
    assert cases_loss.contender("mistaken", smoothed, master, target, expected).error() > case.limit


def tiny(*contenders: runner.Contender, **options) -> runner.Case:
    return runner.Case(
        "tiny", "", 1024, 3.0, lambda quick: list(contenders), lambda: [ceilings.stream(1024)], **options
    )


def test_one_that_raises_is_a_row_and_the_others_go_on():
    def broken() -> None:
        raise RuntimeError("no kernel\nand more")

    rows = measured(
        tiny(runner.Contender("torch eager", lambda: None, lambda: 0.0), runner.Contender("peer", broken, lambda: 0.0))
    )
    assert rows["peer"]["verdict"] == "raised RuntimeError: no kernel" and rows["peer"]["median_ms"] is None
    assert rows["torch eager"]["verdict"] == "ok"
    assert not command.failed(rows["peer"], "optim")
    assert command.failed(rows["peer"] | {"contender": "fusedopt"}, "optim")
    wrong = {"verdict": "wrong", "contender": "torch fused"}
    assert not command.failed(wrong, "loss") and command.failed(wrong, "ddp")
    assert "raised" in next(iter(table_cells(report.terminal("optim", list(rows.values())))))


def table_cells(table) -> list[str]:
    return [cell for column in table.columns for cell in column.cells if "raised" in str(cell)]


def test_only_those_asked_for_take_turns_with_ours():
    names = ["torch eager", "torch fused", "fusedopt", "fusedopt inplace", "peer"]
    contenders = [runner.Contender(name, lambda: None, lambda: 0.0) for name in names]
    rows = []
    runner.measure(tiny(*contenders), True, rows.extend, among=lambda name: "peer" in name)
    assert [row["contender"] for row in rows] == ["fusedopt", "fusedopt inplace", "peer", "stream"]
    assert rows[0]["stock_error"] is not None


def test_a_case_that_does_not_fit_says_so_and_builds_nothing():
    case = tiny(memory=1 << 60)
    with pytest.raises(runner.TooLarge, match=r"tiny: takes about 1073741824 GiB, \d+ are free"):
        runner.measure(case, True, [].extend)


def test_a_contender_is_held_against_the_ceiling_it_names():
    sleepers = {name: runner.Contender(name, partial(time.sleep, seconds), lambda: 0.0, ceiling=ceiling)
                for name, seconds, ceiling in (("a", 2e-3, ""), ("b", 2e-3, "slow"))}  # fmt: skip
    quick, slow = (
        runner.Contender(name, partial(time.sleep, s), lambda: 0.0) for name, s in (("quick", 1e-3), ("slow", 4e-3))
    )
    case = runner.Case("tiny", "", 1024, 3.0, lambda quick: list(sleepers.values()), lambda: [quick, slow], flops=2e9)
    rows = measured(case)
    assert rows["a"]["ceiling"] == "quick" and rows["a"]["ceiling_fraction"] < 1
    assert rows["b"]["ceiling"] == "slow" and rows["b"]["ceiling_fraction"] > 1
    assert rows["slow"]["ceiling_fraction"] == rows["quick"]["ceiling_fraction"] == 1
    assert rows["a"]["tflop_per_s"] == pytest.approx(2e9 / rows["a"]["median_ms"] * 1e-9, rel=0.01)


def test_memory_that_a_run_takes_is_counted():
    rows = measured(tiny(runner.Contender("taker", lambda: torch.ones(1 << 20), lambda: 0.0)))
    assert rows["taker"]["peak_mib"] == 4.0


def test_cases_said_to_leave_the_cache_do():
    for suite in registry.COMPARED:
        for case in registry.registry(suite):
            assert case.cache in runner.CACHES
            if case.cache == "memory" and case.bytes:  # of a curve the smallest may not
                assert case.bytes >= 64 << 20 or case.sweep, case.name


def test_emptying_the_cache_makes_a_small_step_slower():
    """By a lot; the sizes are of any machine's second cache."""
    x = torch.ones(1 << 16)
    runs = {cache: runner.Contender("one", lambda: x.mul_(1.0), lambda: 0.0) for cache in ("warm", "cold")}
    took = {cache: measured(tiny(one, cache=cache, in_a_row=20))["one"]["p20_ms"] for cache, one in runs.items()}
    assert took["cold"] > 1.2 * took["warm"]


def test_an_infinite_error_is_wrong_and_still_json():
    broken = runner.Contender("broken", lambda: None, lambda: float("inf"))
    row = measured(tiny(broken))["broken"]
    assert row["verdict"] == "wrong"
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_relative_error_sees_nan_and_scale():
    oracle = torch.tensor([1.0, 2.0, 1e-12], dtype=torch.float64)
    assert runner.relative_error(oracle, oracle, torch.float32) == 0
    assert runner.relative_error(oracle * float("nan"), oracle, torch.float32) == float("inf")
    assert runner.relative_error(oracle + 1e-7, oracle, torch.float32) == pytest.approx(1e-7 / 2**-23, rel=1e-3)


def test_what_was_measured_survives_an_interruption():
    """Ctrl-C after a complete turn."""
    runs = iter(range(6))

    def run() -> None:
        if next(runs, None) is None:
            raise KeyboardInterrupt

    rows = []
    with pytest.raises(KeyboardInterrupt):
        runner.measure(tiny(runner.Contender("one", run, lambda: 0.0)), quick=True, keep=rows.extend)
    assert [row["contender"] for row in rows] == ["one", "stream"]


@pytest.mark.usefixtures("small_models")
def test_gpu_cases_on_the_cpu_at_a_smaller_size(monkeypatch):
    """The cases themselves: names, oracles, targets. What they measure here is nothing."""
    monkeypatch.setattr(cases_optim_gpu, "_ours", lambda cls: {"fusedopt": cls, "fusedopt triton": cls})
    on_gpu = cases_optim_gpu.cases()
    assert len({case.name for case in on_gpu}) == len(on_gpu) == 17
    assert all(case.device == "cuda" and case.name.startswith("gpu-") and case.memory for case in on_gpu)
    monkeypatch.setattr(cases_optim_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(cases_optim_gpu, "IN_A_ROW", 1)
    for case in cases_optim_gpu.cases():
        if case.sweep:
            continue
        rows = measured(case)
        assert {row["verdict"] for row in rows.values()} == {"ok"}, case.name
        claimed = {name for target in case.targets for name in (target.ours, target.against)}
        assert claimed <= {*rows, ceilings.COPY}, case.name


def test_claims_and_the_fastest_of_the_others_are_told():
    rows = {
        name: {"contender": name, "median_ms": ms, "host_ms": host, "verdict": "ok", "ceiling_fraction": 1 / ms,
               "ceiling": "copy"}
        for name, ms, host in
        (("torch fused", 4.0, 3.0), ("peer", 3.0, 2.0), ("fusedopt", 2.0, 0.25), ("copy", 1.0, 0.01))
    }  # fmt: skip
    rows["broken"] = {"contender": "broken", "median_ms": None, "verdict": "raised OSError: no"}
    targets = (runner.Target("fusedopt", "torch fused", 10.0, "host_ms"), runner.Target("fusedopt", "copy", 0.4))
    case = runner.Case("x", "Title", 1, 1.0, lambda quick: [], list, targets, device="cuda")
    peer, ceiling, host = report.comparisons(case, rows)
    assert peer == ["Title", "peer", "fusedopt", "3.00 ms", "2.00 ms", "50% of copy", "1.50x", ""]
    assert ceiling == ["Title", "copy", "fusedopt", "1.00 ms", "2.00 ms", "50% of copy", "0.50x", "0.4x: reached"]
    assert host == [
        *("Title, host time", "torch fused", "fusedopt", "3.00 ms", "0.250 ms", "", "12.00x"),
        "10x: reached",
    ]


def test_new_rows_replace_those_of_their_case(tmp_path):
    path = tmp_path / "optim.jsonl"
    store.merge(path, [{"case": "b", "contender": "x", "n": 1}, {"case": "a", "contender": "x", "n": 1}], ["a", "b"])
    store.merge(path, [{"case": "b", "contender": "y", "n": 2}], ["a", "b"])
    assert [(row["case"], row["contender"], row["n"]) for row in store.read(path)] == [("a", "x", 1), ("b", "y", 2)]
    store.merge(path, [{"case": "c", "contender": "y", "n": 3}], ["b", "c"])  # "a" is no case any more
    assert [row["case"] for row in store.read(path)] == ["b", "c"]


def test_readme_check_finds_an_edited_number(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(README)
    ask = ["readme", "--out", str(results), "--readme", str(page)]
    assert command.main([*ask, "--check"]) == 1
    assert command.main(ask) == 0
    assert command.main([*ask, "--check"]) == 0
    text = page.read_text()
    assert "between" in text and "Not measured yet." in text and "old" not in text
    rows = tables.by_case(store.read(results / "optim.jsonl"))["adamw-2000x64-f32"]
    ratio = f"{rows['torch fused']['median_ms'] / rows['fusedopt']['median_ms']:.2f}x"
    assert f"| {ratio} | 15x: " in text
    assert machine.cpu_model() in text and torch.__version__ in text

    page.write_text(text.replace(ratio, "99.00x"))
    capsys.readouterr()
    assert command.main([*ask, "--check"]) == 1
    assert "99.00x" in capsys.readouterr().out


def test_readme_refuses_an_unknown_marker(results, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- benchmarks:speed -->\n<!-- /benchmarks:speed -->\n")
    with pytest.raises(ValueError, match="benchmarks:speed"):
        command.main(["readme", "--out", str(results), "--readme", str(page)])


def test_train_table_from_a_summary(tmp_path):
    figures = {
        "ms": {phase: {"median": 4.0, "p25": 3.0, "p75": 5.0} for phase in ("loss", "optimizer", "model", "step")},
        "tokens_per_second": 1000.0,
        "peak_mib": 10.0,
        "val_loss": 2.5,
    }
    summary = {
        "contenders": {"stock": figures, "fused": figures},
        "stock_over_fused": {"loss": 1.5, "optimizer": 2.5, "model": 1.0, "step": 1.25, "peak_mib": 1.1},
        "val_loss_fused_minus_stock": 1e-5,
        "parameters": 2_500_000,
        "machine": {"processes": 1, "line": "a processor"},
        "versions": {"fusedopt": "0.1.0", "python": "3.11"},
        "command": ["/somewhere/train/__main__.py", "--compare", "--out", str(tmp_path / "runs")],
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "summary.json").write_text(json.dumps(summary))
    text = report.train_block(tmp_path, "results/m")
    assert "| optimizer | 4.00 ms | 4.00 ms | 2.50x |" in text
    assert "`python -m fusedopt.train --compare --out runs`" in text
    assert str(tmp_path) not in text


# --- pieces: what a machine that is lent for minutes does ---


def test_out_of_time_leaves_the_rest_for_another_call(tmp_path, capsys):
    ask = ["optim", "--quick", "--cases", "x64-f32-sweep", "--peers", "none", "--out", str(tmp_path)]
    assert command.main([*ask, "--minutes", "0"]) == run.LEFT
    assert not store.read(tmp_path / "optim.jsonl")
    assert command.main([*ask, "--cases", "adamw-100x64-f32-sweep"]) == 0
    first = store.read(tmp_path / "optim.jsonl")
    assert {row["contender"] for row in first} == {"fusedopt", "stream"}
    assert command.main([*ask, "--missing"]) == 0
    rows = store.read(tmp_path / "optim.jsonl")
    assert len(tables.by_case(rows)) == len(shapes.TENSOR_COUNTS)
    assert [row for row in rows if row["case"] == first[0]["case"]] == first  # not measured again
    capsys.readouterr()


def test_a_suite_leaves_no_process_group(tmp_path, capsys):
    """Of its shared cases: the suite after it makes its own."""
    had = torch.distributed.is_initialized()
    ask = ["optim", "--quick", "--cases", "300-dtensors", "--peers", "none", "--out", str(tmp_path)]
    assert command.main(ask) == 0
    assert torch.distributed.is_initialized() == had
    assert {row["contender"] for row in store.read(tmp_path / "optim.jsonl")} == {"fusedopt", "stream"}


def test_cases_of_one_dtype():
    args = command.parser().parse_args(["optim", "--dtype", "bf16"])
    found = run.Run(args, args).cases("optim")
    assert found and all(case.dtype == "bf16" for case in found)


def test_a_picture_of_each_suite_and_curve(tmp_path):
    environment = {**machine.environment(), "quick": True}
    figures = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "verdict": "ok", "dtype": "f32"}
    optim = [{"case": "adamw-gpt2-small-f32", "contender": name, **figures, **environment, "median_ms": ms}
             for name, ms in (("torch default", 200.0), ("fusedopt", 2.0), ("stream", 1.5))]  # fmt: skip
    curve = [{"case": f"c{n}", "contender": name, **figures, **environment, "sweep": [what, n]}
             for what in plot.CURVES for n in (10, 1000) for name in ("fusedopt", "peer", "copy")]  # fmt: skip
    broken = {
        "case": "adamw-gpt2-small-f32",
        "contender": "peer",
        **environment,
        "median_ms": None,
        "verdict": "raised",
    }
    store.merge(tmp_path / "optim.jsonl", [*optim, broken, *curve], [])
    plot.draw(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"optim.png", "tensors.png", "vocabulary.png"}
