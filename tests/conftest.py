"""What every test starts from: one seed, and process-wide switches put back afterwards. And `-n`: tests/workers.py."""

import os

import processes
import pytest
import torch

from fusedopt.backends import cpu


def pytest_configure(config):
    config.pluginmanager.register(processes.Plugin())
    if config.getoption("numprocesses", None):
        # A worker and what it starts have one core: no threads but those that a test sets, and those do not spin, which
        # would keep another worker from the core that they wait for. Workers inherit it, before OpenMP has started.
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`-n auto`: the cores that there are; more than eight workers would wait for the longest test all the same."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from workers import Scheduling

    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        from workers import long_ones_first

        long_ones_first(items)


@pytest.fixture(autouse=True)
def _same_start():
    threads, isa = torch.get_num_threads(), cpu.isa() if cpu.available() is True else None
    # small parallel loops stall where other processes hold the cores; tests of threads ask for them
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        cpu._native.use_cpu_isa(isa)
