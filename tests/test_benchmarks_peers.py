"""Other libraries in the benchmarks: stand-ins called as the real ones are, reasons that are kept, trials, their table.

Nothing is installed and nothing of another library is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
for extra in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(extra)
import torch.nn.functional as F  # noqa: E402

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import peers, probe, readme, reasons, store, trial  # noqa: E402
from fusedopt.optim import AdamW as Fused  # noqa: E402


@pytest.fixture(autouse=True)
def unloaded():
    """What a test loads is its own."""
    peers.loaded.cache_clear()
    yield
    peers.loaded.cache_clear()


# --- stand-ins: every peer's module, as its adapter imports it ---


class Optimi(torch.optim.Optimizer):
    """As torch-optimi: defaults of its own, averages kept corrected for their bias, steps counted in the group."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=1e-2, eps=1e-6, kahan_sum=None):
        assert kahan_sum is False
        beta1, beta2 = betas
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "wd": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            t = int(group.setdefault("step", torch.tensor(0)).add_(1))
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), kahan_comp=None)
                for key, g, beta in (
                    ("exp_avg", p.grad, group["beta1"]),
                    ("exp_avg_sq", p.grad.square(), group["beta2"]),
                ):
                    state[key].lerp_(g, 1 - (beta - beta**t) / (1 - beta**t))
                p.mul_(1 - group["lr"] * group["wd"])
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-group["lr"])


class Counting(torch.optim.AdamW):
    """AdamW with states of other names. `count`: the step in each state, in the last (DeepSpeed), or in the group."""

    names = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    count = "last"

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, adamw_mode=True):
        assert adam_w_mode and adamw_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.steps = 0

    def step(self):
        for state in self.state.values():
            moments = {key: state.pop(other) for key, other in self.names.items()}
            state.update(moments, step=torch.tensor(float(self.steps)))
        super().step()
        self.steps += 1
        (group,) = self.param_groups
        for p in group["params"]:
            state = self.state[p]
            moments = {other: state.pop(key) for key, other in self.names.items()}
            state.update(moments, step=self.steps if self.count == "each" or p is group["params"][-1] else 0)
            if self.count == "group":
                group["step"] = state.pop("step")


class Bitsandbytes(Counting):
    names = {"exp_avg": "state1", "exp_avg_sq": "state2"}
    count = "each"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)


class Grouped(Counting):
    count = "group"


def builder():
    return type("Builder", (), {"load": lambda self: "the C++ that it compiled"})


def e_c(e, c, targets, impl, filter_eps="high"):
    assert (impl, filter_eps) in (("cce", None), ("torch_compile", "high"))
    return F.cross_entropy(e @ c.t(), targets)


STAND_INS = {
    "optimi": {"AdamW": Optimi},
    "deepspeed.ops.adam": {"DeepSpeedCPUAdam": Counting, "FusedAdam": Counting},
    "deepspeed.ops.op_builder": {"CPUAdamBuilder": builder(), "FusedAdamBuilder": builder()},
    "apex.optimizers": {"FusedAdam": Grouped},
    "transformer_engine.pytorch.optimizers": {"FusedAdam": Grouped},
    "bitsandbytes.optim": {"AdamW": Bitsandbytes, "AdamW8bit": partial(Fused, state_dtype="8bit")},
    "torchao.optim": dict.fromkeys(("AdamW8bit", "AdamWFp8", "AdamW4bit"), Fused),
    "liger_kernel.transformers": {
        "LigerCrossEntropyLoss": lambda: F.cross_entropy,
        "LigerFusedLinearCrossEntropyLoss": lambda: lambda weight, x, target: F.cross_entropy(x @ weight.t(), target),
    },
    "cut_cross_entropy": {"linear_cross_entropy": e_c},
    "quack": {"cross_entropy": F.cross_entropy},
    "quack.linear_cross_entropy": {
        "chunked_linear_cross_entropy": lambda x, weight, target: F.cross_entropy(x @ weight.t(), target)
    },
    "flash_attn.losses.cross_entropy": {"CrossEntropyLoss": lambda: F.cross_entropy},
}


def put(monkeypatch, name, attributes):
    """A module in sys.modules, and the packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        parent = ".".join(parts[:end])
        if parent not in STAND_INS:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def installed(monkeypatch):
    for name in sorted(STAND_INS):
        put(monkeypatch, name, STAND_INS[name])


@pytest.fixture
def nothing(monkeypatch):
    for name in STAND_INS:
        monkeypatch.setitem(sys.modules, name.split(".")[0], None)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(probe, "TIMED", [(64, 64)])
    monkeypatch.setattr(probe, "LOGITS", (20, 301))
    monkeypatch.setattr(probe, "HEAD", (24, 16, 96))


# --- the table ---


def test_the_table_is_whole():
    assert len(peers.BY_NAME) == len(peers.PEERS)
    assert {peer.kind for peer in peers.PEERS} == set(peers.KINDS) == set(probe.KINDS)
    assert all(peer.devices and set(peer.devices) <= {"cpu", "cuda"} for peer in peers.PEERS)
    packages = [peer.package for peer in peers.PEERS]
    first_seen = list(dict.fromkeys(packages))
    assert packages == sorted(packages, key=first_seen.index)  # else one environment would be made twice


@pytest.mark.parametrize("name", peers.BY_NAME)
def test_every_adapter_is_right_as_its_peer_is_called(name, installed, small):
    stages = []
    row = probe.attempt(peers.BY_NAME[name], "cpu", 1, stages.append)
    assert (row["outcome"], row["reason"]) == (probe.RAN, ""), row
    assert row["error"] <= row["error_limit"] and row["median_ms"] > 0 and row["ours_ms"] > 0
    assert [stage["outcome"] for stage in stages] == [probe.NOT_IMPORTED, probe.NOT_RUN]


def test_found_and_absent_go_by_kind_and_device(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimi", None)
    assert list(peers.found("adamw", "cpu")) == ["DeepSpeed CPUAdam", "DeepSpeed FusedAdam", "bitsandbytes 32-bit"]
    assert peers.absent("adamw", "cpu") == ["torch-optimi"]
    assert list(peers.found("cross-entropy", "cuda")) == ["liger", "quack", "flash-attn"]
    assert peers.found("cross-entropy", "cpu") == {} and peers.absent("cross-entropy", "cpu") == []
    assert peers.found("", "cpu") == {}
    assert "optimi" in peers.reason("torch-optimi") and peers.reason("liger") == ""


def test_any_error_of_a_load_is_absence_with_its_reason_and_is_not_asked_again(installed, monkeypatch):
    calls = []

    class Builder:
        def load(self):
            calls.append(1)
            try:
                raise OSError("libcuda.so.1: cannot open shared object file")
            except OSError as error:
                raise RuntimeError("Unable to JIT load the cpu_adam op") from error

    put(monkeypatch, "deepspeed.ops.op_builder", {"CPUAdamBuilder": Builder})
    for _ in range(2):
        assert "DeepSpeed CPUAdam" in peers.absent("adamw", "cpu")
    assert peers.reason("DeepSpeed CPUAdam") == (
        "RuntimeError: Unable to JIT load the cpu_adam op; because of "
        "OSError: libcuda.so.1: cannot open shared object file"
    )
    assert len(calls) == 1


def test_versions_are_of_distributions(monkeypatch):
    asked = {"torch-optimi": "0.3.3"}

    def version(package):
        if package not in asked:
            raise peers.importlib.metadata.PackageNotFoundError(package)
        return asked[package]

    monkeypatch.setattr(peers.importlib.metadata, "version", version)
    assert peers.version("torch-optimi") == "0.3.3" and peers.version("apex") is None


@pytest.mark.parametrize("make", [Fused, torch.optim.AdamW, partial(Optimi, kahan_sum=False, **peers.ADAMW)])
def test_states_are_found_under_torchs_names_and_wrong_ones_are_seen(make):
    assert probe.steps_error(make, "cpu") < probe.KINDS["adamw"].limit

    class Off:
        """A state that is off by a hundredth of a per cent; the parameters are right."""

        def __init__(self, params):
            self.inner = make(params)
            self.state, self.param_groups, self.steps = self.inner.state, self.inner.param_groups, 0

        def step(self):
            self.inner.step()
            self.steps += 1
            if self.steps == probe.STEPS:
                for state in self.state.values():
                    state["exp_avg_sq"].mul_(1.0001)

    assert probe.steps_error(Off, "cpu") > 800


# --- trials ---


def attempt(name):
    return probe.attempt(peers.BY_NAME[name], "cpu", 1, lambda row: None)


def test_a_wrong_peer_is_wrong(installed, small, monkeypatch):
    put(monkeypatch, "optimi", {"AdamW": lambda params, **options: Optimi(params, **options | {"eps": 1e-6})})
    put(monkeypatch, "liger_kernel.transformers", {
        "LigerFusedLinearCrossEntropyLoss": lambda: lambda weight, x, t: F.cross_entropy(x @ weight.t(), t) * 2
    })  # fmt: skip
    for name in ("torch-optimi", "liger linear"):
        row = attempt(name)
        assert row["outcome"] == probe.WRONG and row["error"] > row["error_limit"] and row["reason"] == ""


def test_a_peer_that_raises_tells_its_words(installed, small, monkeypatch):
    def raising(words):
        def loss(*_):
            raise RuntimeError(words)

        return loss

    words = "Mismatched Tensor " + "x" * 300 + " expected device_type=cuda"
    put(monkeypatch, "quack", {"cross_entropy": raising(words)})
    put(monkeypatch, "quack.linear_cross_entropy", {"chunked_linear_cross_entropy": raising("bad shape")})
    put(monkeypatch, "bitsandbytes.optim", {"AdamW": raising("no kernel for CUDA"), "AdamW8bit": Fused})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    quack = attempt("quack")
    assert (quack["outcome"], quack["reason"]) == (probe.NEEDS_GPU, reasons.clean(f"RuntimeError: {words}"))
    assert attempt("quack linear")["outcome"] == probe.NOT_RUN  # says nothing of a GPU
    assert attempt("bitsandbytes 32-bit")["outcome"] == probe.NOT_RUN  # is said to run here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attempt("quack")["outcome"] == probe.NOT_RUN  # there is one


def test_an_absent_peer_failed_to_import(nothing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in peers.BY_NAME:
        row = attempt(name)
        assert row["outcome"] == probe.NOT_IMPORTED and row["reason"].startswith("ModuleNotFoundError: "), row


CHILD = """
import json, os, pathlib, sys
name, device, turns, path = sys.argv[-4:]
{body}
"""


@pytest.fixture
def child(monkeypatch):
    """The probe's process does what `body` says."""

    run = trial._run

    def replaced(body, seconds=60):
        def start(command, seconds_, variables=None):
            return run([sys.executable, "-c", CHILD.format(body=body), *command[-4:]], seconds, variables)

        monkeypatch.setattr(trial, "_run", start)

    return replaced


def arguments(**options):
    return argparse.Namespace(**{"device": "cpu", "quick": True, "install": False, "apex": None} | options)


def test_a_trial_is_one_row_whatever_happens_to_its_process(child):
    silent = partial(trial.measure, tell=lambda text: None)
    told = {"outcome": probe.RAN, "reason": "", "version": "1", "error": 0.5, "median_ms": 2.0, "ours_ms": 1.0}
    child(f"print('noise'); pathlib.Path(path).write_text(json.dumps({told!r}))")
    (row,) = silent("torch-optimi", arguments())
    assert row == told | {
        "case": "torch-optimi", "contender": "torch-optimi", "kind": "adamw", "device": "cpu", "verdict": "ok",
        "work": probe.KINDS["adamw"].work, "installed": "before",
    }  # fmt: skip
    stage = f"pathlib.Path(path).write_text(json.dumps({{'outcome': {probe.NOT_RUN!r}, 'version': '1'}}))"
    child(f"{stage}; os.kill(os.getpid(), 4)")
    (row,) = silent("torch-optimi", arguments())
    assert (row["outcome"], row["reason"], row["verdict"]) == (probe.NOT_RUN, "ended by signal SIGILL", "raised")
    child("raise SystemExit('E: /home/someone/lib/libx.so.3 is broken')")
    (row,) = silent("torch-optimi", arguments())
    assert (row["outcome"], row["reason"]) == (probe.NOT_IMPORTED, "E: libx.so.3 is broken")
    child(f"import time; {stage}; time.sleep(60)", seconds=1)
    (row,) = silent("torch-optimi", arguments())
    assert (row["outcome"], row["reason"]) == (probe.NOT_RUN, f"no end within {trial.PROBE_SECONDS} s")


def test_what_is_installed_and_that_a_failure_is_told(child, monkeypatch):
    assert trial.pip_words(peers.BY_NAME["torchao"], None) == ("torchao",)
    assert trial.pip_words(peers.BY_NAME["flash-attn"], None) == ("--no-build-isolation", "flash-attn")
    assert trial.pip_words(peers.BY_NAME["apex"], None) == ()  # of that name is another project's there
    assert trial.pip_words(peers.BY_NAME["apex"], "/a/apex")[-1] == "/a/apex"

    class Failed:
        failed = {"outcome": trial.NOT_INSTALLED, "reason": "OSError: CUDA_HOME environment variable is not set."}

    class Empty:
        failed, python, variables = {}, sys.executable, {}

    def measure(name, environment):
        monkeypatch.setattr(trial, "_environment", lambda words: environment)
        return trial.measure(name, arguments(install=True), lambda text: None)[0]

    row = measure("flash-attn", Failed)
    assert row["verdict"] == "raised" and row["installed"] == "anew" and row.items() >= Failed.failed.items()
    child(f"pathlib.Path(path).write_text(json.dumps({{'outcome': {probe.NOT_IMPORTED!r}, 'reason': 'no module'}}))")
    assert measure("apex", Empty)["reason"] == trial.OTHERS_NAME
    assert measure("apex", Empty)["outcome"] == trial.NOT_INSTALLED
    assert measure("torchao", Empty)["outcome"] == probe.NOT_IMPORTED


def test_an_environment_sees_this_torch_and_keeps_pips_reason(monkeypatch):
    """pip is asked twice, under a constraint; here it fails at once."""
    commands, run = [], trial._run

    def recorded(words, seconds, variables=None):
        commands.append(words)
        if "pip" not in words:
            return run(words, seconds, variables)
        constraints = Path(words[words.index("-c") + 1])
        assert constraints.read_text() == f"torch=={trial.version('torch')}\n"
        words_of_pip = "ERROR: x\n  OSError: no CUDA in /usr/local\nhint: y"
        return (0, "") if "--no-deps" in words else (1, words_of_pip)

    monkeypatch.setattr(trial, "_run", recorded)
    monkeypatch.setattr(trial.venv, "create", lambda where, with_pip: trial.venv.EnvBuilder().create(where))
    environment = trial.Environment(("some-peer",))
    assert environment.failed == {"outcome": trial.NOT_INSTALLED, "reason": "OSError: no CUDA in ..."}
    assert [words[-1] for words in commands[1:]] == ["some-peer"] * 2
    status, path = run([environment.python, "-c", "import torch; print(torch.__file__)"], 60, environment.variables)
    assert status == 0 and path.strip() == torch.__file__


def test_the_command_keeps_each_row_and_ctrl_c_those_that_were_tried(child, tmp_path, monkeypatch):
    child(f"pathlib.Path(path).write_text(json.dumps({{'outcome': {probe.RAN!r}, 'reason': '', 'version': '1', "
          "'error': 1.5, 'error_limit': 9.0, 'median_ms': 3.0, 'ours_ms': 1.5}))")  # fmt: skip
    out = ["--out", str(tmp_path / "results")]
    assert command.main(["peers", "--cases", "torchao", *out]) == 0
    path = tmp_path / "results" / "peers.jsonl"
    rows = store.read(path)
    names = ["torchao", "torchao float8", "torchao 4-bit"]
    assert [row["case"] for row in rows] == names
    assert json.loads(path.read_text().splitlines()[0])["units"] == trial.UNITS
    assert all(row["machine"] and row["commit"] and row["date"] for row in rows)

    def interrupted(case, args, tell, measure=trial.measure):
        if case == "liger":
            raise KeyboardInterrupt
        return measure(case, args, tell)

    monkeypatch.setattr(trial, "measure", interrupted)
    assert command.main(["peers", *out]) == 130
    before_liger = [peer.name for peer in peers.PEERS][: list(peers.BY_NAME).index("liger")]
    assert [row["case"] for row in store.read(path)] == before_liger

    page = tmp_path / "README.md"
    page.write_text("<!-- benchmarks:peers -->\n<!-- /benchmarks:peers -->\n")
    text = readme.regenerated(page, [tmp_path / "results"])
    assert "| torchao | 1 | AdamW, 8-bit states | ran | 1.5 | 3.00 ms | 1.50 ms | 2.00x |" in text
    assert "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |" in text


def test_table_of_what_did_not_run():
    row = {"case": "flash-attn", "kind": "cross-entropy", "outcome": trial.NOT_INSTALLED, "reason": "OSError: no nvcc"}
    ran = {"case": "torch-optimi", "kind": "adamw", "outcome": probe.RAN, "reason": "", "version": "0.3.3"}
    ran |= {"error": 2.6, "median_ms": 10.0, "ours_ms": 4.0}
    header, cells, note = trial.table([row, ran])
    assert len(header) == 8 and cells == [
        ["torch-optimi", "0.3.3", "AdamW", "ran", "2.6", "10.0 ms", "4.00 ms", "2.50x"],
        ["flash-attn", "", "cross entropy", "failed to install: OSError: no nvcc", "", "", "", ""],
    ]
    assert probe.KINDS["adamw"].work in note and "linear" not in note


# --- reasons ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://index.example.org/simple/x/ for it", "see ... for it"),
        ("File /home/alice/.venv/lib/python3.11/site-packages/x/core.py failed", "File core.py failed"),
        ("cannot open /root/.cache/torch", "cannot open ..."),
        (
            "HTTPSConnectionPool(host='files.example.org', port=443): 10.0.0.7",
            "HTTPSConnectionPool(..., port=443): ...",
        ),
        ("libcuda.so.1: cannot open; and/or", "libcuda.so.1: cannot open; and/or"),
        ("a | b\n c", "a / b c"),
        ("x" * 300 + " expected device_type=cuda", "x" * 100 + " ... " + "x" * 74 + " expected device_type=cuda"),
    ],
)
def test_reasons_tell_nothing_of_the_machine(text, expected):
    assert reasons.clean(text) == expected


def test_the_decisive_line_of_an_output():
    pip = """
      Traceback (most recent call last):
        File "/tmp/pip-install-x/setup.py", line 227, in <module>
      OSError: CUDA_HOME environment variable is not set.
      [end of output]
    ERROR: Failed building wheel for flash-attn
    hint: See above for details."""
    assert reasons.of_text(pip) == "OSError: CUDA_HOME environment variable is not set."
    compiler = """
    common.h:18:10: fatal error: cuda_runtime.h: No such file or directory
    compilation terminated.
    subprocess.CalledProcessError: Command '['ninja', '-v']' returned non-zero exit status 1.
    RuntimeError: Error compiling objects for extension
    ERROR: Failed building wheel for x"""
    assert reasons.of_text(compiler) == "fatal error: cuda_runtime.h: No such file or directory"
    dotted = "  packaging.version.InvalidVersion: Invalid version: None\nerror: metadata-generation-failed\nhint: above"
    assert reasons.of_text(dotted) == "packaging.version.InvalidVersion: Invalid version: None"
    assert reasons.of_text("error: metadata-generation-failed\nhint: above") == "error: metadata-generation-failed"
    unknown = "ERROR: Could not find a version that satisfies the requirement x (from versions: none)\nnote: a"
    assert reasons.of_text(unknown) == unknown.splitlines()[0]
    assert reasons.of_text("one\ntwo\n\n") == "two" and reasons.of_text("") == ""
    assert reasons.of_error(ValueError()) == "ValueError"
