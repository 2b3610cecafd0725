"""Optimizers on a GPU: the values of the whole table, and that a step is two launches which nobody waits for."""

import contextlib
import copy
import gc

import pytest
import torch
from optim_table import (
    CASES,
    DTYPES,
    ONE_EACH,
    SHAPES,
    STEPS,
    WITH_LION,
    Case,
    make_params,
    no_further_from_float64_than_stock,
    same_state,
    train,
)
from torch.profiler import ProfilerActivity, profile

import fusedopt.optim

ADAMW = Case("AdamW", {"lr": 0.01, "weight_decay": 0.1})
LAMB = Case("LAMB", {"lr": 0.01, "weight_decay": 0.1})


def random_params(shapes, dtype=torch.float32, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
    return params


def fused_and_stock(case, shapes, backend, dtype=torch.float32):
    return (
        case.fused(random_params(shapes, dtype), backend=backend),
        case.stock(random_params(shapes, dtype), foreach=False),
    )


@contextlib.contextmanager
def nothing_waits():
    """Whatever would wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(work):
    """Names of the kernels that `work` launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in on_device if not event.name.startswith(("Memcpy", "Memset"))], [
        event.name for event in on_device if event.name.startswith(("Memcpy", "Memset"))
    ]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_float64_than_stock(case, dtypes, backend):
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    optimizer = Case(case.name, options).fused(make_params(dtypes, device="cuda"), backend=backend)
    ours = train(optimizer, dtypes)
    report = [row.backend for row in optimizer.backend_report()]
    assert report == [backend if shape.fuses else "reference" for shape in SHAPES.values()]
    assert no_further_from_float64_than_stock(ours, case, dtypes, torchs_bits=lambda shape: False) > 10


def test_the_cpu_agrees(backend):
    """Where no rounding differs by more than contraction: float64."""
    for case in [*WITH_LION, LAMB]:
        gpu, cpu = (
            case.fused(random_params([(300,), (7, 11)], torch.float64, device), backend=name)
            for device, name in (("cuda", backend), ("cpu", "cpu"))
        )
        for _ in range(4):
            gpu.step()
            cpu.step()
        for p, q in zip(gpu.param_groups[0]["params"], cpu.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-13, atol=1e-13)


# --- launches and waiting ---


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_two_launches_a_step_whatever_the_number_of_tensors(case, backend):
    params = random_params([(1000,)] * 1500 + [(3, 7), ()])
    third = len(params) // 3
    groups = [{"params": params[i * third :][:third], "lr": 0.1 * (i + 1)} for i in range(3)]
    optimizer = case.fused(groups, backend=backend)
    for _ in range(3):
        optimizer.step()
    kernels, copies = kernels_of(optimizer.step)
    assert len(kernels) == 2 and not copies, (kernels, copies)
    mixed = case.fused([*params, *random_params([(64,)] * 9, torch.bfloat16)], backend=backend)
    for _ in range(3):
        mixed.step()
    kernels, copies = kernels_of(mixed.step)
    assert len(kernels) == 4 and not copies, (kernels, copies)


def test_lamb_takes_two_more_for_norms(backend):
    optimizer = LAMB.fused(random_params([(1000,)] * 1500 + [(3, 7), (), (70001,)]), backend=backend)
    for _ in range(3):
        optimizer.step()
    kernels, copies = kernels_of(optimizer.step)
    assert len(kernels) == 4 and not copies, (kernels, copies)


def test_new_gradients_are_told_in_few_launches(backend):
    params = random_params([(1000,)] * 2000)
    optimizer = ADAMW.fused(params, backend=backend)
    optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    kernels, copies = kernels_of(optimizer.step)
    # 2000 pointers of 8 bytes go up in one parcel of 32,000 bytes, or one copy
    assert len(kernels) + len(copies) <= 4, (kernels, copies)


def test_a_step_never_waits(backend):
    for case in [*WITH_LION, LAMB]:
        params = random_params([(100,), (33, 5)])
        optimizer = case.fused(params, backend=backend)
        optimizer.step()  # compiles, for Triton
        with nothing_waits():
            optimizer.step()
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.found_inf = torch.zeros(1, device="cuda")
            optimizer.grad_scale = torch.ones(1, device="cuda")
            optimizer.step()
        first = case.fused(random_params([(10,)]), backend=backend)
        with nothing_waits():
            first.step()


def test_the_device_is_not_asked_for_the_learning_rate(backend):
    lr = torch.tensor(0.25, device="cuda")
    optimizer, stock = (
        make(random_params([(100,), (7,)]), lr=rate)
        for make, rate in (
            (lambda p, lr: fusedopt.optim.AdamW(p, lr=lr, backend=backend), lr),
            (lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False), 0.25),
        )
    )
    optimizer.step()
    stock.step()
    with nothing_waits():
        lr.fill_(0.125)
        optimizer.step()
    stock.param_groups[0]["lr"] = 0.125
    stock.step()
    same_state(optimizer, stock)


# --- graphs ---


@pytest.mark.parametrize("case", [*WITH_LION, LAMB], ids=str)
def test_replays_go_on_counting_whatever_eager_steps_do(case, backend):
    """Capture, then an eager step with other gradients, then replays: each as stock on the same gradients."""
    shapes = [(1000,), (5, 7), (), (70001,)]
    lr = torch.tensor(2.0**-6, device="cuda")
    ours = Case(case.name, {**case.options, "lr": lr}).fused(random_params(shapes), backend=backend)
    eager = Case(case.name, {**case.options, "lr": 2.0**-6}).fused(random_params(shapes), backend=backend)
    params, copies = ours.param_groups[0]["params"], eager.param_groups[0]["params"]
    ours.step()
    eager.step()
    captured = [p.grad for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()

    def both(replay, seed, rate):
        lr.fill_(rate)
        eager.param_groups[0]["lr"] = rate
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)).cuda()
            if replay:
                captured[i].copy_(q.grad)
            else:
                p.grad = q.grad.clone()
        graph.replay() if replay else ours.step()
        eager.step()

    both(True, 10, 2.0**-6)
    both(False, 20, 2.0**-7)
    both(True, 30, 2.0**-5)
    both(True, 40, 2.0**-8)
    both(False, 50, 2.0**-6)
    torch.cuda.synchronize()
    same_state(ours, eager, ulps=0)


def test_a_capture_outlives_its_optimizers_other_tables(backend):
    params = random_params([(1000,)] * 20)
    optimizer = ADAMW.fused(params, backend=backend)
    optimizer.step()
    graphs = []
    for _ in range(3):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            optimizer.step()
    before = [p.detach().clone() for p in params]
    for _ in range(4):  # whatever was freed is handed out again, and overwritten
        gc.collect()
        junk = [torch.full((5000,), float("nan"), device="cuda") for _ in range(100)]
        for graph in graphs:
            graph.replay()
    del junk
    torch.cuda.synchronize()
    assert float(optimizer.state[params[0]]["step"]) == 13
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_parameter_first_met_in_a_capture_is_refused(backend):
    optimizer = ADAMW.fused(random_params([(10,)]), backend=backend)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="take one step before the capture"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()


# --- streams, devices, sizes ---


def test_streams(backend):
    """A step runs on the current stream, after what that stream was given before."""
    ours, eager = fused_and_stock(ADAMW, [(1 << 22,), (77,)], backend)
    streams = [torch.cuda.Stream() for _ in range(2)]
    params = ours.param_groups[0]["params"]
    for turn in range(6):
        stream = streams[turn % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # the gradient is late
            for p in params:
                p.grad.mul_(-0.5)
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        for p in eager.param_groups[0]["params"]:
            p.grad.mul_(-0.5)
        eager.step()
    same_state(ours, eager)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_devices_in_one_optimizer(backend):
    params = [*random_params([(100,)], device="cuda:0"), *random_params([(50,), (3,)], device="cuda:1")]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone()
    ours, eager = ADAMW.fused(params, backend=backend), ADAMW.stock(twins, foreach=False)
    for _ in range(3):
        ours.step()
        eager.step()
    assert torch.cuda.current_device() == 0
    same_state(ours, eager)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_more_than_2_to_the_31_elements(name, backend):
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 7 * n:
        pytest.skip(f"needs {7 * n >> 30} GiB of free GPU memory")
    param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 0.5)
    param.grad[-5:] = 2
    optimizer = getattr(fusedopt.optim, name)([param], lr=0.25, backend=backend)
    optimizer.step()
    stock = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16, device="cuda"))
    stock.grad = param.grad[-10:].clone()
    getattr(torch.optim, name)([stock], lr=0.25, foreach=False).step()
    assert torch.equal(param[-10:], stock)
    expected = stock[0].item()
    for block in param[:-5].split(2**28):  # a reduction over all of it would need its own 64-bit indices
        assert bool((block == expected).all())
    del param, optimizer
    torch.cuda.empty_cache()


def test_many_tensors_of_every_alignment(backend):
    """Views into one buffer, as DDP hands them out."""
    sizes = [1 + (37 * i) % 101 for i in range(400)]
    base, grads = (torch.randn(sum(sizes), generator=torch.Generator().manual_seed(s)).cuda() for s in (0, 1))
    params = [torch.nn.Parameter(view) for view in base.clone().split(sizes)]
    twins = [torch.nn.Parameter(view) for view in base.clone().split(sizes)]
    for p, q, grad in zip(params, twins, grads.split(sizes), strict=True):
        p.grad = q.grad = grad
    ours, eager = ADAMW.fused(params, backend=backend), ADAMW.stock(twins, foreach=False)
    for _ in range(3):
        ours.step()
        eager.step()
    same_state(ours, eager)


# --- what surrounds a step ---


@pytest.mark.parametrize("case", [*WITH_LION, LAMB], ids=str)
def test_grad_scaler(case, backend):
    """A real GradScaler, with an overflow in the middle, against the same gradients unscaled by hand."""
    ours = case.fused(random_params([(100,), (3, 5)]), backend=backend)
    plain = case.fused(random_params([(100,), (3, 5)]), backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=10**6)
    scaler.scale(torch.ones((), device="cuda"))
    for turn in range(4):
        for p, q in zip(*(o.param_groups[0]["params"] for o in (ours, plain)), strict=True):
            q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(turn)).cuda()
            p.grad = q.grad * scaler.get_scale()
            if turn == 2:
                p.grad.view(-1)[0] = float("inf")
        scaler.step(ours)
        scaler.update()
        if turn != 2:
            plain.step()
    same_state(ours, plain, ulps=2)


def test_checkpoints_cross_devices(backend):
    """From the CPU, and with step counters that stayed there, as ZeroRedundancyOptimizer leaves them."""
    on_cpu = ADAMW.fused(random_params([(50,), (7, 3)], device="cpu"))
    on_cpu.step()
    ours = ADAMW.fused(random_params([(50,), (7, 3)]), backend=backend)
    eager = ADAMW.stock(random_params([(50,), (7, 3)]), foreach=False)
    for optimizer in (ours, eager):
        optimizer.load_state_dict(on_cpu.state_dict())
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p]["step"] = optimizer.state[p]["step"].cpu()
        optimizer.step()
    same_state(ours, eager)
    back = ADAMW.stock(random_params([(50,), (7, 3)]), foreach=False)
    for p, q in zip(back.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    back.load_state_dict(ours.state_dict())
    ours.step()
    back.step()
    same_state(ours, back)


def test_a_copy_goes_on_by_itself(backend):
    ours = ADAMW.fused(random_params([(50,)]), backend=backend)
    ours.step()
    twin = copy.deepcopy(ours)
    for p, q in zip(twin.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        p.grad = q.grad.clone()
    for _ in range(STEPS):
        ours.step()
    for _ in range(STEPS):
        twin.step()
    same_state(ours, twin, ulps=0)


def test_a_parameter_on_the_cpu_among_them():
    params = [*random_params([(64,)]), *random_params([(64,)], device="cpu")]
    optimizer = fusedopt.optim.AdamW(params)
    optimizer.step()
    assert [row.backend for row in optimizer.backend_report()] == ["cuda", "cpu"]
    torch.testing.assert_close(params[0].detach().cpu(), params[1].detach(), rtol=1e-6, atol=1e-7)


def test_a_gradient_on_another_device_is_an_error(backend):
    params = random_params([(30,), (20,)])
    ours = ADAMW.fused(params, backend=backend)
    ours.step()
    before = [p.detach().clone() for p in params]
    params[1].data = params[1].data.cpu()
    with pytest.raises(RuntimeError, match="device"):
        ours.step()
    assert torch.equal(params[0], before[0])


def test_mended_by_the_next_step_after_memory_moved(backend):
    """`.data` swapped, state replaced, a group added: nothing of the old addresses is written."""
    params = random_params([(300,), (20,)])
    ours = ADAMW.fused(params, backend=backend)
    ours.step()
    old = params[0].data
    kept = old.clone()
    params[0].data = old.clone()
    ours.state[params[1]]["exp_avg"] = ours.state[params[1]]["exp_avg"].clone()
    new = random_params([(9,)], seed=3)
    ours.add_param_group({"params": new, "lr": 0.5})
    ours.step()
    assert torch.equal(old, kept)
    assert not torch.equal(params[0].data, kept)
    assert float(ours.state[new[0]]["step"]) == 1


# --- clipping ---


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@pytest.mark.parametrize("shapes", [[(1000,), (5, 7), (70001,)], [(64,)] * 300])
def test_clips_as_torch_does(case, shapes, backend):
    ours = case.fused(random_params(shapes), backend=backend, max_norm=0.5, skip_non_finite=True)
    stock = case.stock(random_params(shapes))
    for step in range(3):
        for seed, (p, q) in enumerate(
            zip(ours.param_groups[0]["params"], stock.param_groups[0]["params"], strict=True)
        ):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + seed)).cuda()
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(stock.param_groups[0]["params"], 0.5)
        ours.step()
        stock.step()
        torch.testing.assert_close(ours.grad_norm.float(), norm, rtol=1e-5, atol=0)
    same_state(ours, stock, ulps=32)
    before = [p.detach().clone() for p in ours.param_groups[0]["params"]]
    ours.param_groups[0]["params"][1].grad.view(-1)[3] = torch.inf
    ours.step()
    assert int(ours.skipped_steps) == 1
    assert all(torch.equal(p, q) for p, q in zip(ours.param_groups[0]["params"], before, strict=True))


def test_clipping_waits_for_nothing_and_replays(backend):
    params = random_params([(1000,), (5, 7), (70001,)])
    optimizer = ADAMW.fused(params, backend=backend, max_norm=0.5, skip_non_finite=True)
    optimizer.step()
    with nothing_waits():
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for size in (2.0, 3.0):
        for p in params:
            p.grad.fill_(size)
        graph.replay()
        assert float(optimizer.grad_norm) == pytest.approx(size * sum(p.numel() for p in params) ** 0.5, rel=1e-6)
    params[0].grad[5] = torch.nan
    before = [p.detach().clone() for p in params]
    graph.replay()
    assert int(optimizer.skipped_steps) == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
