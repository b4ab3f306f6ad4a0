"""Shared fixtures. Kernels in Triton run through its interpreter, so that the suite needs no GPU; TRITON_INTERPRET=0
compiles them, for the tests that run on one (bench/on_gpu.py)."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before anything imports deq
# Threads that spin while they wait take the core from the tests beside (pytest -n 2): 176 s for three files, so 45.
# Read by libgomp when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from deq import _library, implicit

# The same examples in every run: a change is judged by what it does, not by which examples it draws.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--isa", default="auto", help="run the suite on avx512, avx2 or portable kernels; auto: the best")


def compare_as_triton_3_7() -> None:
    """Whatever Triton is here: the interpreter of the one that PyPI's torch 2.13 brings takes no ``constant * tensor``
    right of a comparison, where the constant is first."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl

    for name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
        method = getattr(tl.tensor, name)

        @functools.wraps(method)
        def checked(self, other, *args, method=method, **kwargs):
            if isinstance(other, tl.constexpr) and isinstance(other.value, tl.tensor):
                raise TypeError(f"{other} is compared with: write the tensor left of the constant")
            return method(self, other, *args, **kwargs)

        setattr(tl.tensor, name, checked)


def pytest_configure(config):
    compare_as_triton_3_7()
    wanted = config.getoption("--isa")
    if wanted != "auto" and not _library.use_isa(wanted):
        raise pytest.UsageError(f"--isa {wanted}: this CPU or build has no such kernels; deq info lists what there is")


@pytest.fixture(autouse=True)
def no_reports():
    """Of gradients that a test does not read: another one would tell of them."""
    yield
    for waiting in (implicit._unread, implicit._tallies, implicit._replayed):
        waiting.clear()


def pytest_report_header():
    return (
        f"deq kernels: {_library.compiled.deq_cpu_isa().decode() if _library.compiled else 'none, ' + _library.reason}"
    )


@pytest.fixture(scope="module")
def one_thread():
    """Small problems gain nothing from more, and lose much where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    """Runs the test once for every instruction set that this CPU and build have."""
    library = _library.compiled
    if library is None:
        pytest.skip(f"no compiled library: {_library.reason}")
    before = library.deq_cpu_isa().decode()
    if not _library.use_isa(request.param):
        pytest.skip(f"this CPU or build has no {request.param}")
    yield request.param
    _library.use_isa(before)


@pytest.fixture
def run_with(tmp_path):
    """``run_with(site, code)``: what ``code`` prints in a new process whose deq is the one in ``site``."""
    checkout = Path(__file__).resolve().parents[1]
    others = [entry for entry in sys.path if entry and Path(entry).resolve() != checkout]

    def run(site: Path, code: str) -> str:
        env = os.environ | {"PYTHONPATH": os.pathsep.join((str(site), *others))}
        # -S: no .pth file, so that an editable install of deq cannot answer the import.
        done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
