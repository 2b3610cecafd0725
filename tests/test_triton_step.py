"""Every Triton kernel of the optimizers by value, in Triton's interpreter (triton_interpreter.py): no GPU needed."""

import pytest
import torch
from optim_table import CASES, DTYPES, SHAPES, STEPS, Case, make_params, oracle, set_grads, stock, train

import fusedopt
from fusedopt.backends import cpu
from fusedopt.backends import triton as backend

pytest.importorskip("triton")

from triton_by_hand import CHUNK, ByHand, all_tensors, filled
from triton_interpreter import INTERPRETED, interpreted, run_anew

from fusedopt.backends.triton import table

needs_native = pytest.mark.skipif(cpu.available() is not True, reason=str(cpu.available()))


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is what started it")
def test_in_the_interpreter():
    run_anew(__file__)


@pytest.fixture
def large_blocks(monkeypatch):
    """A block per chunk: the interpreter takes as long for a small one."""
    monkeypatch.setattr(table, "TUNING", {size: t._replace(block=CHUNK) for size, t in table.TUNING.items()})


# --- the table of all optimizers, by their own step() ---


@pytest.fixture
def engine(monkeypatch, large_blocks):
    """Optimizers of CPU tensors, asked for the Triton backend, get it."""
    monkeypatch.setattr(backend, "device_types", frozenset({"cpu"}))
    monkeypatch.setattr(backend, "available", lambda: True)


@interpreted
@needs_native
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_float64_than_stock(case, dtypes, engine):
    torch.set_num_threads(1)
    exact = oracle(case, dtypes)
    theirs = stock(case, dtypes) if case.name != "Lion" else None
    optimizer = case.fused(make_params(dtypes), backend="triton")
    ours = train(optimizer, dtypes)
    ran = [row.backend for row in optimizer.backend_report()]
    assert ran == ["triton" if shape.fuses else "reference" for shape in SHAPES.values()]
    ulps = STEPS * torch.finfo(DTYPES[dtypes][0]).eps  # as tests/test_optim_values.py has it
    for i, name in enumerate(SHAPES):
        assert list(ours.tensors[i]) == list(exact.tensors[i])
        for key, value in exact.tensors[i].items():
            tolerance = ulps * exact.peaks[i][key]
            error = (ours.tensors[i][key] - value).abs()
            if exact.doubtful is not None and key == "param":
                assert torch.all(error <= 2 * STEPS * float(case.options["lr"]) + tolerance)
                error = error[~exact.doubtful[i]]
            stock_error = (theirs.tensors[i][key] - value).abs().max() if theirs and value.numel() else 0.0
            assert torch.all(error <= stock_error + tolerance), f"{name} {key}"


@interpreted
@needs_native
def test_an_overflow_changes_nothing_and_the_scale_divides(engine):
    scaled, plain = make_params("f32"), make_params("f32")
    optimizer = fusedopt.optim.AdamW(scaled, lr=0.01, backend="triton")
    train(optimizer, "f32", 2)
    before = [t.clone() for p in scaled for t in (p.detach(), *optimizer.state[p].values())]
    set_grads(scaled, "f32", 3)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    after = [t for p in scaled for t in (p.detach(), *optimizer.state[p].values())]
    assert all(map(torch.equal, after, before))
    for p in scaled:
        p.grad.mul_(4)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    train(fusedopt.optim.AdamW(plain, lr=0.01, backend="triton"), "f32", 3)
    assert all(map(torch.equal, scaled, plain))


@interpreted
@needs_native
def test_a_step_sends_nothing_where_nothing_moved(engine, monkeypatch):
    """The engine's own tables, as they change: steps in a row, a gradient in another place, a scheduler."""
    params = [torch.nn.Parameter(filled(n, n)) for n in (3, 50)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Case("SGD", {"lr": 0.5, "momentum": 0.5}).fused(params, backend="triton")
    optimizer.step()
    recorded = Recorded(monkeypatch)
    optimizer.step()
    assert recorded.take() == []
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert recorded.take() == [(table._START, 1)]
    held, params[1].grad = params[1].grad, torch.ones(50)
    optimizer.step()
    assert recorded.take() == [(0, 5)]
    assert torch.equal(held, params[1].grad)


# --- what may not change a bit ---


SLICES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    255,
    256,
    257,
    511,
    512,
    513,
    1023,
    1024,
    1025,
    2047,
    3001,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
]


@interpreted
@pytest.mark.parametrize("multiprocessors", [1, 40])  # chunks shared by no programs, and by many
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32-grads", "f64"])
def test_an_elements_place_does_not_matter(dtypes, multiprocessors, monkeypatch):
    """Slices of all lengths and alignments, against the same elements in one tensor; what lies around stays."""
    monkeypatch.setattr(table, "_multiprocessors", lambda device: multiprocessors)
    dtype, grad_dtype = DTYPES[dtypes]
    numel = sum(SLICES)
    case = Case("Adagrad", {"lr": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5})

    def run(lengths, gaps):
        """Each tensor `gap` elements into memory of its own kind, guarded at both ends."""
        memory, params, grads, sums = [], [], [], []
        for seed, (source, dtype_, out) in enumerate([(0, dtype, params), (1, grad_dtype, grads), (2, dtype, sums)]):
            values, at = filled(numel, source, dtype_), 0
            for i, n in enumerate(lengths):
                gap = gaps[(i + seed) % len(gaps)] if gaps else 0
                block = torch.full((n + gap + 16,), -7.0, dtype=dtype_)
                view = block[gap : gap + n]
                view.copy_(values[at : at + n])
                memory.append((block, gap, n))
                out.append(view)
                at += n
        params = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad_dtype = g.dtype
            p.grad = g
        by_hand = ByHand(case.fused(params))
        for p, total in zip(params, sums, strict=True):
            by_hand.state[p]["sum"] = total
        by_hand.step()
        for block, gap, n in memory:
            assert torch.all(block[:gap] == -7) and torch.all(block[gap + n :] == -7)
        return torch.cat([p.detach() for p in params]), torch.cat(sums)

    together = run([numel], [])
    assert not torch.equal(together[0], filled(numel, 0, dtype))
    for gaps in ([0], [0, 1, 0, 3, 0], [2, 8, 4, 1]):
        for ours, expected in zip(run(SLICES, gaps), together, strict=True):
            assert torch.equal(ours, expected)


@interpreted
def test_groups_of_one_launch_are_apart(large_blocks):
    """Several groups, learning rates from Python and from tensors of both widths, against each group alone."""
    options = [
        {"lr": 0.01, "weight_decay": 0.1},
        {"lr": torch.tensor(0.03), "betas": (0.3, 0.8)},
        {"lr": torch.tensor(0.07, dtype=torch.float64), "maximize": True, "eps": 1e-3},
        {"lr": 0.02, "maximize": True, "betas": (0.0, 0.5)},
    ]

    def optimizer(i):
        params = [torch.nn.Parameter(filled(n, 10 * i + n)) for n in (3, 400, 0, 17)]
        for p in params:
            p.grad = filled(p.numel(), 99 + p.numel())
        return Case("AdamW", options[i]).fused(params)

    alone = [ByHand(optimizer(i)) for i in range(4)]
    together = ByHand(*(optimizer(i) for i in range(4)))
    for step in range(3):
        if step == 2:  # a scheduler fills a tensor learning rate and sets a float one
            options[1]["lr"].fill_(0.5)
            for by_hand in (*alone, together):
                for group in by_hand.param_groups:
                    group["lr"] = 0.25 if group["lr"] == 0.01 else group["lr"]
        for by_hand in (*alone, together):
            by_hand.step()
            by_hand.changed = False
    expected = [t for by_hand in alone for group in by_hand.param_groups for t in group["params"]]
    for ours, theirs in zip([p for group in together.param_groups for p in group["params"]], expected, strict=True):
        assert torch.equal(ours, theirs)
    assert together.launched == 2


@interpreted
@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_found_inf_keeps_everything(rule, large_blocks):
    case = Case(rule, {"lr": 0.1, **({"momentum": 0.9} if rule == "SGD" else {})})
    runs = []
    for skips in (False, True):
        params = [torch.nn.Parameter(filled(n, n)) for n in (5, 0, 1000)]
        by_hand = ByHand(case.fused(params))
        by_hand.grad_scale = torch.tensor(1.0)
        for step in range(3):
            for p in params:
                p.grad = filled(p.numel(), 7 * step)
            if skips:  # an overflow before each step that counts, the very first too
                before = [t.clone() for t in all_tensors(by_hand)] + [c.clone() for c in by_hand.counters.values()]
                by_hand.found_inf = torch.tensor(1.0)
                by_hand.step()
                after = all_tensors(by_hand) + list(by_hand.counters.values())
                assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            by_hand.found_inf = torch.tensor(0.0)
            by_hand.step()
        runs.append(by_hand)
    plain, skipping = runs
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(plain), all_tensors(skipping), strict=True))
    assert all(float(c) == 3 for c in skipping.counters.values())


@interpreted
@pytest.mark.parametrize("dtypes", DTYPES)
def test_gradients_are_unscaled_in_the_compute_type(dtypes, large_blocks):
    dtype, grad_dtype = DTYPES[dtypes]
    runs = []
    for scale in (1.0, 2.0**6):
        p = torch.nn.Parameter(filled(100, 0, dtype))
        p.grad_dtype = grad_dtype
        p.grad = filled(100, 1, grad_dtype) * scale
        by_hand = ByHand(Case("SGD", {"lr": 0.1, "maximize": True}).fused([p]))
        by_hand.grad_scale = torch.tensor(scale)
        by_hand.step()
        runs.append(p.detach())
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], filled(100, 0, dtype))


# --- what the C++ rules do ---


@interpreted
@needs_native
def test_rules_are_those_of_cpp():
    native = {name: (hyper, states) for name, (_, hyper, states, _) in cpu.rules().items()}
    assert list(backend.rule_names().items()) == list(native.items())


ODD = [0.0, -0.0, 1.0, -2.5, 1e-30, 1e-42, torch.inf, -torch.inf, torch.nan]


@interpreted
@needs_native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_infinities_and_nans_are_those_of_cpp(case):
    """Every pair of odd parameters and gradients, three steps; between, zeros and their negatives."""
    # whether sq - g_avg * g_avg is inf - inf, where both squares overflow, is the compiler's choice: it may contract
    odd = torch.tensor([*ODD, 1e19 if case.options.get("centered") else 3e38])
    start, grad = torch.cartesian_prod(odd, odd).t()
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for wrap in (ByHand, lambda optimizer: optimizer):
            p = torch.nn.Parameter(start.to(dtype, copy=True).contiguous())
            optimizer = wrap(case.fused([p], backend="cpu"))
            for step in range(3):
                p.grad = grad.to(dtype).contiguous() if step != 1 else torch.zeros(len(grad), dtype=dtype)
                optimizer.step()
            runs.append({"param": p.detach(), **optimizer.state[p]})
        assert runs[0].keys() == runs[1].keys()
        for ours, theirs in ((runs[0][key], runs[1][key]) for key in runs[0]):
            # C++ may contract a multiplication and an addition, which where the parameter is huge or the second moment
            # subnormal shows in the last places
            torch.testing.assert_close(ours, theirs, rtol=16 * torch.finfo(dtype).eps, atol=1e-30, equal_nan=True)


# --- what is sent, and when ---


class Recorded:
    """A table that remembers its uploads: (first word, number of arrays)."""

    def __init__(self, monkeypatch):
        self.sent = []
        upload = table.DeviceTable._upload

        def record(own, begin, parts):
            self.sent.append((begin, len(parts)))
            upload(own, begin, parts)

        monkeypatch.setattr(table.DeviceTable, "_upload", record)

    def take(self):
        sent, self.sent = self.sent, []
        return sent


@interpreted
def test_only_what_changed_is_sent(monkeypatch, large_blocks):
    recorded = Recorded(monkeypatch)
    params = [torch.nn.Parameter(filled(n, n)) for n in (3, 50)]
    optimizer = Case("SGD", {"lr": 0.5}).fused(params)
    by_hand = ByHand(optimizer)
    expected = [p.detach().clone() for p in params]

    def step(lr):
        for p, e in zip(params, expected, strict=True):
            e -= lr * p.grad
        by_hand.step()
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e)

    for p in params:
        p.grad = filled(p.numel(), 1)
    step(0.5)
    assert recorded.take() == [(0, 5)]
    by_hand.changed = False
    for p in params:
        p.grad.copy_(filled(p.numel(), 2))
    step(0.5)
    assert recorded.take() == []
    optimizer.param_groups[0]["lr"] = 0.125
    step(0.125)
    assert recorded.take() == [(table._START, 1)]
    step(0.125)
    assert recorded.take() == []
    by_hand.changed = True
    held = [p.grad for p in params]
    for p in params:
        p.grad = filled(p.numel(), 3)
    step(0.125)
    assert recorded.take() == [(0, 5)]
    optimizer.add_param_group({"params": [torch.nn.Parameter(filled(9, 9))], "lr": 0.25})
    by_hand = ByHand(optimizer)
    params.append(optimizer.param_groups[1]["params"][0])
    expected.append(params[2].detach().clone())
    params[2].grad = torch.zeros(9)
    step(0.125)
    assert recorded.take() == [(0, 5)]
    del held


@interpreted
def test_launches_are_counted(large_blocks):
    empty = ByHand(Case("AdamW").fused([torch.nn.Parameter(torch.empty(0, 3))]))
    empty.param_groups[0]["params"][0].grad = torch.empty(0, 3)
    empty.step()
    assert empty.launched == 1 and float(next(iter(empty.counters.values()))) == 1
    many = [torch.nn.Parameter(filled(n % 7, n)) for n in range(300)]  # over one program of `prepare`
    for p in many:
        p.grad = torch.ones_like(p)
    by_hand = ByHand(Case("AdamW").fused(many))
    by_hand.step()
    assert by_hand.launched == 2 and {float(c) for c in by_hand.counters.values()} == {1.0}
    nothing = backend.new_table(torch.device("cpu"))
    assert nothing.step([], torch.zeros(0, 11, dtype=torch.int64)) == 0


@interpreted
def test_one_step_of_two_launches(large_blocks):
    """Rules and dtypes of their own, one blob."""
    table_ = backend.new_table(torch.device("cpu"))
    captured = []
    optimizers = []
    for dtype, case in ((torch.float32, Case("SGD", {"lr": 0.5})), (torch.bfloat16, Case("Lion", {"lr": 0.25}))):
        p = torch.nn.Parameter(filled(33, 3, dtype))
        p.grad = filled(33, 4, dtype)
        by_hand = ByHand(case.fused([p]))
        by_hand.table = type(
            "Catch", (), {"step": lambda self, launches, groups, *_: captured.append((launches[0], groups)) or 0}
        )()
        by_hand.step()
        optimizers.append((p, by_hand))
    launches = [launch for launch, _ in captured]
    launches[1].rows[:, 7] = 1
    numpy = [launches[0], launches[1]._replace(rows=launches[1].rows.numpy(), grads=launches[1].grads.numpy())]
    assert table_.step(numpy, torch.cat([groups for _, groups in captured])) == 4
    (a, _), (b, _) = optimizers
    assert torch.equal(a.detach(), filled(33, 3) - 0.5 * filled(33, 4))
    assert torch.equal(b.detach(), (filled(33, 3, torch.bfloat16).float() - 0.25).bfloat16())
