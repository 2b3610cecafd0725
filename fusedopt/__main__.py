"""`python -m fusedopt`: what runs here and why, and a self-test of a second or two. `--json` for machines."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fusedopt
from fusedopt import backends
from fusedopt.backends import cpu


def environment() -> dict[str, Any]:
    """Versions, processor, threads and backends of this process."""
    report: dict[str, Any] = {
        "fusedopt": fusedopt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    info = cpu.build_info()
    if cpu._native is not None:
        report["cpu"] = {
            "instruction_set": cpu.isa(),
            "instruction_sets_available": cpu._native.cpu_isas(),
            "forced_by_FUSEDOPT_CPU": os.environ.get("FUSEDOPT_CPU"),
            "openmp": cpu._native.has_openmp(),
            "compiler": info.get("compiler"),
        }
    if info.get("cuda", {}).get("built"):
        report["cuda"] = {key: info["cuda"][key] for key in ("nvcc", "archs", "ptx")}
    report["backends"] = {}
    for name, state in backends.available().items():
        entry: dict[str, Any] = {"on": state is True}
        if state is not True:
            entry |= {"reason": state, "remedy": backends.module(name).remedy()}
        report["backends"][name] = entry
    report["devices"] = devices([name for name, entry in report["backends"].items() if entry["on"]])
    return report


def devices(names: list[str]) -> list[dict[str, Any]]:
    """Every GPU that PyTorch sees, and which of the backends `names` have kernels for it."""
    found = []
    for kind, library in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        for index in range(library.device_count() if library.is_available() else 0):
            properties = library.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}" if kind == "cuda" else None
            modules = [backends.module(name) for name in names if name != "reference"]
            device = torch.device(kind, index)
            served = [module.name for module in modules if backends.takes(module, device)]
            found.append(
                {"device": str(device), "name": properties.name, "compute_capability": capability, "backends": served}
            )
    return found


def _step_error(name: str, dtype: torch.dtype, backend: str, device: str) -> tuple[float, float]:
    """(fused error, what is allowed) of three steps against torch.optim in float64; Lion has only its own reference."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1009, generator=generator).to(device, dtype)
    grads = [torch.randn(1009, generator=generator).to(device, dtype) for _ in range(3)]

    def run(cls: Callable[..., Any], as_dtype: torch.dtype, **options: Any) -> torch.Tensor:
        param = start.to(as_dtype, copy=True).requires_grad_()
        optimizer = cls([param], lr=1e-2, **options)
        for grad in grads:
            param.grad = grad.to(as_dtype)
            optimizer.step()
        return param.detach().double()

    fused = getattr(fusedopt.optim, name)
    if name == "Lion":
        exact, stock = run(fused, torch.float64, backend="reference"), run(fused, dtype, backend="reference")
    else:
        exact, stock = run(getattr(torch.optim, name), torch.float64), run(getattr(torch.optim, name), dtype)
    # stock's own error, and two roundings of the largest parameter
    allowed = (stock - exact).abs().max() + 2 * torch.finfo(dtype).eps * start.abs().max()
    return (run(fused, dtype, backend=backend) - exact).abs().max().item(), allowed.item()


def _loss_error(dtype: torch.dtype) -> tuple[float, float]:
    """(error of loss and gradient, what is allowed) against float64."""
    logits = (torch.randn(37, 1009, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    target = torch.arange(37) * 27
    exact = logits.double().requires_grad_()
    ours = logits.clone().requires_grad_()
    exact_loss = torch.nn.functional.cross_entropy(exact, target)
    loss = fusedopt.nn.functional.cross_entropy(ours, target)
    exact_loss.backward()
    loss.backward()
    error = max(
        (loss.double() - exact_loss).abs().item() / exact_loss.item(),
        (ours.grad.double() - exact.grad).abs().max().item() / exact.grad.abs().max().item(),
    )
    return error, max(torch.finfo(dtype).eps, 4e-6)


def self_test(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every optimizer, on the CPU and once for each backend of a GPU, and the loss, against float64; one row each."""
    places = [("auto", "cpu")]
    for device in report["devices"]:
        places += [(name, device["device"]) for name in device["backends"] if name not in dict(places)]
    for dtype in (torch.float32, torch.bfloat16):
        errors = {
            (name, *place): _step_error(name, dtype, *place)
            for place in places
            for name in ("Adam", "AdamW", "RMSprop", "Adagrad", "SGD", "Lion")
        }
        errors["cross_entropy", "auto", "cpu"] = _loss_error(dtype)
        for (name, backend, device), (error, allowed) in errors.items():
            yield {
                "test": name,
                "backend": backend,
                "device": device,
                "dtype": str(dtype)[6:],
                "error": error,
                "allowed": allowed,
                "ok": error <= allowed,
            }


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit code is 1 when the self-test fails."""
    parser = argparse.ArgumentParser(prog="python -m fusedopt", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)

    report = environment()
    started = time.perf_counter()
    report["self_test"] = list(self_test(report))
    report["self_test_seconds"] = round(time.perf_counter() - started, 2)
    ok = all(row["ok"] for row in report["self_test"])
    if options.json:
        print(json.dumps(report | {"ok": ok}, indent=2))
        return 0 if ok else 1

    print(f"fusedopt {report['fusedopt']}, torch {report['torch']}, Python {report['python']}, {report['machine']}")
    print(f"threads   {report['threads']} (torch.get_num_threads())")
    if "cpu" in report:
        native = report["cpu"]
        openmp = "OpenMP" if native["openmp"] else "no OpenMP: one thread only"
        print(
            f"CPU       {native['instruction_set']} in use, of {', '.join(native['instruction_sets_available'])} "
            f"(FUSEDOPT_CPU forces one); {openmp}; built by {native['compiler']}"
        )
    if "cuda" in report:
        built = report["cuda"]
        ptx = f", PTX of {', '.join(map(str, built['ptx']))}" if built["ptx"] else ""
        print(f"CUDA      built by nvcc {built['nvcc']} for {', '.join(f'sm_{arch}' for arch in built['archs'])}{ptx}")
    print("backends")
    for name, state in report["backends"].items():
        print(f"  {name:10} {'on' if state['on'] else 'off: ' + state['reason']}")
        if not state["on"]:
            print(f"  {'':10} remedy: {state['remedy']}")
    if report["devices"]:
        print("devices")
    for device in report["devices"]:
        capability = f", compute capability {device['compute_capability']}" if device["compute_capability"] else ""
        kernels = ", ".join(device["backends"]) or "PyTorch's own"
        print(f"  {device['device']:10} {device['name']}{capability}; kernels: {kernels}")
    failed = [row for row in report["self_test"] if not row["ok"]]
    print(
        f"self-test {len(report['self_test']) - len(failed)} of {len(report['self_test'])} agree with float64 as well "
        f"as stock PyTorch does ({report['self_test_seconds']} s)"
    )
    for row in failed:
        place = f"{row['test']} {row['dtype']} on {row['device']} ({row['backend']})"
        print(f"  FAILED  {place}: error {row['error']:.2e}, allowed {row['allowed']:.2e}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
