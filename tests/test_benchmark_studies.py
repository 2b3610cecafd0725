"""The benchmarks that train: their codes against independent definitions, rows that are kept, claims from rows."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import codes, modes, readme, registry, store  # noqa: E402
from fusedopt.optim import codes as fused_codes  # noqa: E402

TINY = {"tokenizer": "bytes", "vocab_size": 256, "layers": 1, "dim": 16, "heads": 4, "seq_len": 16, "batch_size": 2}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Both studies on a model and a text that take no time."""
    (tmp_path / "text.txt").write_text("the loss of a fused step is the same\n" * 100)
    for study in (codes, modes):
        full = study._arguments

        def arguments(*words, full=full):
            args = full(*words)
            vars(args).update(TINY, data=[str(tmp_path / "text.txt")], eval_batches=1)
            return args

        monkeypatch.setattr(study, "_arguments", arguments)
        study._corpus.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    for study in (codes, modes):
        study._corpus.cache_clear()


# --- the codes ---


def spread_out(n: int) -> torch.Tensor:
    """Either sign, six decades."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator) * 10 ** (-6 * torch.rand(n, generator=generator))


@pytest.mark.parametrize("signed", [True, False])
def test_ours_is_what_the_optimizers_keep(signed):
    values = spread_out(5000) if signed else spread_out(5000).square()
    code = codes.OURS.first if signed else codes.OURS.second
    kept = codes.rounded(values, fused_codes.BLOCK, code, torch.Generator())
    expected = fused_codes.dequantize(*fused_codes.quantize(values, signed))
    # the same codes; the value is scaled in another order of float32 products
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [128, 2048])
def test_a_block_shares_its_largest_magnitude(block):
    values = spread_out(3 * 2048 + 5)
    kept = codes.rounded(values, block, codes.OURS.first, torch.Generator())
    for exact, mine in zip(values.split(block), kept.split(block), strict=True):
        u = (mine.abs() / exact.abs().max()).sqrt() * 127
        torch.testing.assert_close(u, u.round(), rtol=0, atol=1e-3)
        assert (u.round() - (exact.abs() / exact.abs().max()).sqrt() * 127).abs().max() < 0.501
        assert torch.equal(mine.sign(), torch.where(u.round() == 0, 0, exact.sign()))


def test_rounding_at_random_is_unbiased_between_neighbours():
    code, trials = codes.at_random(255, 4), 4000
    part = torch.tensor([0.9, 0.5, 1e-2, 1e-4, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    kept = code(part.repeat(trials, 1), generator)
    low = (part**0.25 * 255).floor().clamp(max=254)
    below, above = (low / 255) ** 4, ((low + 1) / 255) ** 4
    assert torch.all(torch.isclose(kept, below) | torch.isclose(kept, above))
    deviation = ((part - below) * (above - part)).clamp(min=0).sqrt()  # of a choice between two
    assert torch.all((kept.mean(0) - part).abs() <= 5 * deviation / trials**0.5 + 1e-6 * part)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_decodes_the_published_bits(signed):
    """Sign, zeros that tell the decade, a one, and the place within the decade in the bits that are left."""
    found = {0.0, 1.0}  # told by the patterns without a one
    for pattern in range(1, 1 << 7):
        text = f"{pattern:07b}"
        zeros = text.index("1")
        rest = text[zeros + 1 :]
        for last in ("",) if signed else ("0", "1"):  # the sign's bit, where there is no sign
            places = 1 << len(rest + last)
            value = 10.0**-zeros * (0.1 + 0.9 * (int(rest + last or "0", 2) + 0.5) / places)
            found |= {value, -value} if signed else {value}
    assert len(found) == 256
    assert sorted(codes.dynamic(signed)) == pytest.approx(sorted(found), rel=1e-12)


def test_nearest_of_a_table():
    table = codes.dynamic(True)
    values = torch.linspace(-1, 1, 4001)
    kept = codes.nearest_of(table)(values, torch.Generator())
    best = (values[:, None] - torch.tensor(table)).abs().amin(1)
    torch.testing.assert_close((kept - values).abs(), best, rtol=0, atol=1e-6)


def test_float8_keeps_four_bits():
    part = torch.cat([torch.logspace(-4, 0, 999), torch.tensor([1.0, 0.0])])
    kept = codes.e4m3(part, torch.Generator())
    assert (kept - part).abs().le(part * 2**-4).all() and kept[-2] == 1 and kept[-1] == 0


def test_errors_are_against_moments_that_were_never_rounded():
    p = torch.randn(64, 64).requires_grad_()
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.5, 0.75))
    exact = codes.Exact(optimizer)
    gradients = [torch.randn(64, 64), torch.randn(64, 64)]
    for p.grad in gradients:
        optimizer.step()
        for state in optimizer.state.values():
            state["exp_avg_sq"].mul_(1.25)
    assert exact.errors(optimizer)["exp_avg_error"] == pytest.approx(0, abs=1e-6)
    first, second = (0.25 * g.square() for g in gradients)
    kept, true = (first * 1.25 * 0.75 + second) * 1.25, first * 0.75 + second
    expected = float(((kept - true) / true).median())
    assert exact.errors(optimizer)["exp_avg_sq_error"] == pytest.approx(expected, rel=1e-4)


# --- the command ---


def test_a_study_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "results")]
    monkeypatch.setattr(codes, "SETTING", ("--vocab-size", "2048", "--steps", "11"))
    monkeypatch.setattr(codes, "SEEDS", (0,))
    some = dict(list(codes.RUNS.items())[:3])
    monkeypatch.setattr(codes, "RUNS", some)
    measured = []
    measure = codes.measure
    monkeypatch.setattr(codes, "measure", lambda case, *more: measured.append(case) or measure(case, *more))
    first, *others = some
    assert command.main(["codes", "--cases", first, *out]) == 0
    assert command.main(["codes", *out]) == 0
    assert measured == [first, *others]
    rows = store.read(tmp_path / "results" / "codes.jsonl")
    assert [row["case"] for row in rows] == list(some)
    assert rows[0]["exp_avg_error"] == 0 < rows[1]["exp_avg_error"] < 0.1
    assert rows[0]["steps"] == 11 and len({row["text"] for row in rows}) == 1
    assert rows[0]["val_loss"] != rows[1]["val_loss"] == pytest.approx(rows[0]["val_loss"], rel=1e-2)
    assert {row["verdict"] for row in rows} == {"ok"}


def test_every_mode_is_measured(tiny, tmp_path):
    assert command.main(["modes", "--quick", "--out", str(tmp_path)]) == 0
    rows = store.read(tmp_path / "modes.jsonl")
    losses, times = ([row for row in rows if (row["case"] == modes.TIMES) == timed] for timed in (False, True))
    assert [row["contender"] for row in losses] == [row["contender"] for row in times] == [m.name for m in modes.MODES]
    for row in losses:
        assert row["bytes_per_parameter"] == pytest.approx(
            row["weights_bytes"] + row["states_bytes"] + row["masters_bytes"], abs=1e-3
        )
        assert row["val_loss"] == pytest.approx(losses[0]["val_loss"], rel=1e-2)
    assert {row["weights_bytes"] for row in losses} == {2.0, 4.0}
    for row in times:
        for phase in ("optimizer", "step"):
            assert 0 < row[f"{phase}_p20_ms"] <= row[f"{phase}_ms"] <= row[f"{phase}_p80_ms"]
        assert row["optimizer_ms"] < row["step_ms"]
    page = tmp_path / "README.md"
    page.write_text("<!-- benchmarks:modes -->\n<!-- /benchmarks:modes -->\n")
    assert readme.regenerated(page, [tmp_path]).count("\n| ") == 1 + 1 + len(modes.MODES)


def test_claims_of_the_modes_follow_the_rows():
    base = {0: 5.00, 1: 5.03, 2: 5.01}  # 0.03 apart
    beside = {"8-bit states": (-0.01, 0.029, 0.0), "bf16 weights, master": (0.0, 0.031, 0.0), "bf16 states": (1, 1, 1)}
    rows = []
    for name, offsets in {"f32": (0, 0, 0), **beside}.items():
        for seed, offset in enumerate(offsets):
            held = {"weights_bytes": 2.0, "states_bytes": 8.0, "masters_bytes": 2.0, "bytes_per_parameter": 12.0}
            loss = base[seed] + offset
            rows.append({"case": f"{name} {seed}", "contender": name, "seed": seed, "val_loss": loss, **held})
    times = {"optimizer_ms": 1.234, "step_ms": 56.78}
    rows.append({"case": modes.TIMES, "contender": "8-bit states", **times})
    header, cells, note = modes.table(rows)
    lines = {cell[0]: dict(zip(header, cell, strict=True)) for cell in cells}
    claim = header[-1]
    assert "0.0300 apart" in note
    assert lines["8-bit states"][claim] == "reached" and lines["bf16 weights, master"][claim] == "not reached"
    assert lines["bf16 states"][claim] == lines["f32"][claim] == ""  # shown, not claimed
    assert (lines["8-bit states"]["less f32's"], lines["8-bit states"]["largest"]) == ("+0.0063", "+0.0290")
    assert (lines["8-bit states"]["optimizer"], lines["8-bit states"]["whole step"]) == ("1.23 ms", "56.8 ms")
    assert lines["f32"]["weights + states + master"] == "2 + 8 + 2" and lines["f32"]["optimizer"] == ""
    assert modes.table(rows[:4])[1][1][-1] == ""  # two of three seeds: no claim yet


def test_table_of_the_codes_is_of_differences():
    rows = [
        {"contender": c, "block": b, "seed": s, "val_loss": v, "exp_avg_error": 0.01, "exp_avg_sq_error": 0.005}
        for c, b, s, v in (
            (codes.BASE.name, codes.BASE.block, 0, 5.0), (codes.OURS.name, 256, 0, 5.0012),
            (codes.OURS.name, 2048, 0, 4.9), (codes.OURS.name, 2048, 1, 4.8),
        )
    ]  # fmt: skip
    header, cells, note = codes.table(rows)
    assert "(5.0000)" in note and len(header) == 7
    assert cells == [
        [codes.OURS.name, "256", "1.00%", "0.50%", "+0.0012", "", ""],
        [codes.OURS.name, "2048", "1.00%", "0.50%", "-0.1000", "", ""],
    ]


def test_studies_are_registered_and_not_part_of_all():
    assert set(registry.STUDIES) == set(store.STUDIES)
    assert not set(store.STUDIES) & set(store.SUITES)
    for study in registry.STUDIES.values():
        assert len(set(study.cases())) == len(study.cases()) and set(study.cases(True)) <= set(study.cases())
