"""The benchmarks' own machinery: rows are complete, wrong contenders are found, the README follows the data."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch.optim import AdamW

from benchmarks import __main__ as command
from benchmarks import cases_loss, cases_optim, cases_optim_gpu, cases_step, machine, report, runner, store
from fusedopt import optim as fused

KEYS = {
    *("case", "contender", "median_ms", "p20_ms", "p80_ms", "repeats", "bytes", "gb_per_s", "ceiling_ms"),
    *("ceiling_fraction", "error", "stock_error", "error_limit", "verdict", "machine", "cores", "threads"),
    *("instruction_set", "torch", "fusedopt", "python", "commit", "date", "quick"),
}
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
    assert command.main(["optim", "--quick", "--cases", "2000x64", "--out", str(folder)]) == 0
    return folder


def test_a_run_writes_complete_rows_and_a_plot(results):
    header = json.loads((results / "optim.jsonl").read_text().splitlines()[0])
    assert header["suite"] == "optim"
    rows = store.read(results / "optim.jsonl")
    assert [row["contender"] for row in rows] == ["torch fused", "torch default", "fusedopt", "stream"]
    for row in rows:
        assert set(row) == KEYS
        assert row["verdict"] == "ok"
        assert row["bytes"] == 2000 * 64 * 28
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(
            row["bytes"] / row["median_ms"] * 1e-6, rel=0.01, abs=6e-4
        )  # both are rounded
    assert (results / "summary.png").read_bytes().startswith(b"\x89PNG")


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
    rows = measured(cases_optim.case("tiny", "", [(40, 7), (1,), (300,)], torch.float32, 28, oracle, builds))
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {"torch default": "ok", "fusedopt": "ok", "stream": "ok", "mistaken": "wrong"}


def test_clipping_contenders_agree_with_their_oracle(monkeypatch):
    monkeypatch.setattr(cases_step, "GPT2_SMALL", [(129, 65), (64,), (1,)])
    for case in cases_step.cases():
        assert {row["verdict"] for row in measured(case).values()} == {"ok"}


@pytest.mark.parametrize("name", ["rmsprop", "adagrad", "sgd", "lion", "adamw"])
def test_every_registered_optimizer_agrees_with_its_oracle(name, monkeypatch):
    monkeypatch.setattr(cases_optim, "GPT2_SMALL", [(129, 65), (64,), (1,)])
    cases = [case for case in cases_optim.cases() if case.name.startswith(name) and "2000x64" not in case.name]
    assert cases
    for case in cases:
        assert {row["verdict"] for row in measured(case).values()} == {"ok"}


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


def test_an_infinite_error_is_wrong_and_still_json():
    broken = runner.Contender("broken", lambda: None, lambda: float("inf"))
    row = measured(runner.Case("tiny", "", 1024, 3.0, lambda quick: [broken]))["broken"]
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
    case = runner.Case("tiny", "", 1024, 3.0, lambda quick: [runner.Contender("one", run, lambda: 0.0)])
    with pytest.raises(KeyboardInterrupt):
        runner.measure(case, quick=True, keep=rows.extend)
    assert [row["contender"] for row in rows] == ["one", "stream"]


def test_gpu_cases_on_the_cpu_at_a_smaller_size(monkeypatch):
    """The cases themselves: names, oracles, targets. What they measure here is nothing."""
    monkeypatch.setattr(cases_optim_gpu, "BILLION", [(33, 7), (5,)])
    monkeypatch.setattr(cases_optim_gpu, "GPT2_SMALL", [(33, 7), (5,)])
    monkeypatch.setattr(cases_optim_gpu, "LLAMA_7B_SHARD", [(33, 7), (5,)])
    monkeypatch.setattr(cases_optim_gpu, "IN_A_ROW", 1)
    monkeypatch.setattr(cases_optim_gpu, "_ours", lambda cls: {"fusedopt": cls, "fusedopt triton": cls})
    cases = cases_optim_gpu.cases()
    assert len({case.name for case in cases}) == len(cases) == 9
    for case in cases:
        on_cpu = partial(cases_optim_gpu.case, device="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(cases_optim_gpu, "case", lambda *args, on_cpu=on_cpu, **kw: on_cpu(*args))
            twin = next(c for c in cases_optim_gpu.cases() if c.name == case.name)
        rows = measured(twin)
        assert {row["verdict"] for row in rows.values()} == {"ok"}
        assert {name for target in case.targets for name in (target.ours, target.against)} <= set(rows)


def test_host_time_is_told_where_it_is_claimed():
    rows = {
        name: {"contender": name, "median_ms": 4.0, "host_ms": host, "verdict": "ok"}
        for name, host in (("torch fused", 3.0), ("fusedopt", 0.25), ("stream", 0.01))
    }
    targets = (runner.Target("fusedopt", "torch fused", 10.0, "host_ms"),)
    case = runner.Case("x", "Title", 1, 1.0, lambda quick: [], targets, device="cuda")
    plain, host = report.comparisons(case, rows)
    assert plain == ["Title", "torch fused", "fusedopt", "4.00 ms", "4.00 ms", "1.00x", ""]
    assert host == [
        *("Title, host time", "torch fused", "fusedopt", "3.00 ms", "0.250 ms", "12.00x"),
        "10x: reached",
    ]


def test_new_rows_replace_those_of_their_case(tmp_path):
    path = tmp_path / "optim.jsonl"
    store.merge(path, [{"case": "b", "contender": "x", "n": 1}, {"case": "a", "contender": "x", "n": 1}], ["a", "b"])
    store.merge(path, [{"case": "b", "contender": "y", "n": 2}], ["a", "b"])
    assert [(row["case"], row["contender"], row["n"]) for row in store.read(path)] == [("a", "x", 1), ("b", "y", 2)]


def test_readme_check_finds_an_edited_number(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(README)
    ask = ["readme", "--out", str(results), "--readme", str(page)]
    assert command.main([*ask, "--check"]) == 1
    assert command.main(ask) == 0
    assert command.main([*ask, "--check"]) == 0
    text = page.read_text()
    assert "between" in text and "Not measured yet." in text and "old" not in text
    rows = report.by_case(store.read(results / "optim.jsonl"))["adamw-2000x64-f32"]
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
