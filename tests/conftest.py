"""Shared fixtures. Kernels in Triton run through its interpreter, so that the suite needs no GPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before anything imports deq

import pytest

from deq import _library


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    """Runs the test once for every instruction set that this CPU and build have."""
    library = _library.compiled
    if library is None:
        pytest.skip(f"no compiled library: {_library.reason}")
    before = library.deq_cpu_isa()
    if library.deq_cpu_set_isa(request.param.encode()) != 0:
        pytest.skip(f"this CPU or build has no {request.param}")
    yield request.param
    library.deq_cpu_set_isa(before)
