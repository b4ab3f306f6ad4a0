"""The gradient of a weight, a sum of outer products over the batch."""

import pytest
import torch
from close import assert_as_accurate

from deq import _library
from deq.backends import cpu, reference

pytestmark = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (0, 3), (5, 7), (3, 16), (4, 17), (64, 100), (2, 333), (257, 33), (2, 3, 40), (0, 2, 5), (1, 1024)],
)
def test_every_shape(shape, dtype, isa):
    u, z = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype, seed=1)
    exact = u.double().mT @ z.double()
    flat = (1, max(exact.numel(), 1)) if exact.numel() else (1, 0)
    assert_as_accurate(cpu.outer(u, z).reshape(flat), reference.outer(u, z).reshape(flat), exact.reshape(flat))


def test_no_bit_tells_the_number_of_threads():
    u, z = rows(9, 1111), rows(9, 1111, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.outer(u, z)
        torch.set_num_threads(2)
        assert torch.equal(cpu.outer(u, z), one)
    finally:
        torch.set_num_threads(before)


def test_any_strides_and_types():
    wide, tall = rows(6, 80), rows(40, 6, seed=1)
    for u, z in [(wide[:, 3:43], wide[:, 40:]), (wide[::2, :40], wide[1::2, 40:]), (tall.mT, wide[:, :40])]:
        assert_as_accurate(cpu.outer(u, z), reference.outer(u, z), u.double().mT @ z.double())
    half = wide.bfloat16()
    assert torch.equal(cpu.outer(half, half), reference.outer(half, half))
    many = rows(cpu.OUTER_UP_TO + 1, 3)
    assert torch.equal(cpu.outer(many, many), reference.outer(many, many))
    one = wide[:1].expand(6, 80)
    assert_as_accurate(cpu.outer(one, wide), reference.outer(one, wide), one.double().mT @ wide.double())
