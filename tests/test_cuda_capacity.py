"""What the CUDA kernels hold: the formulas that plans are made from against those that the kernels are launched by."""

import pytest

from deq import _cuda, _library, cuda_capacity
from deq.backends import cuda
from deq.gpu_device import find_device, table
from deq.gpu_times import grid_tiles, resident_cuda_tiles

needs_kernels = pytest.mark.skipif(
    not _library.has_cuda, reason=f"the library has no CUDA kernels: {_cuda.why_not('cuda')}"
)
SHARED = (99 * 1024, 163 * 1024, 227 * 1024)


@needs_kernels
@pytest.mark.parametrize("shared", SHARED)
def test_python_and_cpp_agree(shared):
    kernel = _library.compiled.deq_cuda_kernel
    for m in (*range(1, 420), *range(420, 6000, 61)):
        ours = cuda_capacity.block_kernel(m, shared)
        assert kernel(0, m, 1, 132, shared) == (-1 if ours is None else ours), m
        for batch, processors in ((0, 132), (1, 108), (8, 132), (9, 132), (32, 148), (300, 132)):
            ours = cuda_capacity.grid_kernel(m, batch, processors, shared)
            assert kernel(1, m, batch, processors, shared) == (-1 if ours is None else ours), (m, batch, processors)


def test_largest_widths():
    largest = {
        shared: max(m for m in range(1, 500) if cuda_capacity.block_kernel(m, shared) is not None) for shared in SHARED
    }
    assert largest == {99 * 1024: 224, 163 * 1024: 288, 227 * 1024: 336}
    assert max(m for m in range(1, 6000) if cuda_capacity.grid_kernel(m, 8, 132, 227 * 1024) is not None) == 4224


@pytest.mark.parametrize("name", table())
def test_a_width_that_fits_stays_possible_when_it_shrinks(name):
    device = find_device(name)
    for capacity, batch in ((resident_cuda_tiles, 64), (grid_tiles, 8)):
        fits = [capacity(m, batch, device, 2) is not None for m in range(1, 4600, 13)]
        assert fits == sorted(fits, reverse=True)
    assert resident_cuda_tiles(64, 8, device, 4) is None and grid_tiles(64, 8, device, 1) is None  # bfloat16 alone


@needs_kernels
@pytest.mark.skipif(_cuda.why_not("cuda") == "", reason="a GPU is here: nothing is refused")
def test_without_a_gpu_the_reason_is_cudas_own():
    with pytest.raises(cuda.Refused, match="asking for the device failed: CUDA driver"):
        cuda.plan_launch(1, 8, 64, 0)
    with pytest.raises(cuda.Refused, match="CUDA driver"):
        cuda.measure("grid_barrier")
    with pytest.raises(cuda.Refused, match="asking for the device failed: CUDA driver"):
        cuda.plan_rescue(1, 8, 64, 0)


@needs_kernels
def test_sizes_that_mean_nothing_are_refused():
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        for plan in (cuda.plan_launch, cuda.plan_rescue):
            with pytest.raises(cuda.Refused, match="out of range"):
                plan(*sizes, 0)


@needs_kernels
def test_scratch_of_a_substitution():
    """The triangle in tiles of 16 x 16, and what is solved of every eight samples."""
    needed = _library.compiled.deq_cuda_substitute_bytes
    assert needed(0, 1) == 4 * 256 and needed(1, 17) == 4 * (3 * 256 + 4 * 2 * 128)
    assert needed(-1, 1) == needed(1, 0) == 0
