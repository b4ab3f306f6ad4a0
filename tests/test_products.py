"""Products of matrices by the compiled kernels: the gradient of a weight, the inverse of the Cayley map."""

import numpy as np
import pytest
import torch
from close import assert_as_accurate

from deq import _library, products
from deq.backends import cpu, reference

pytestmark = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(left, right):
    """In 80 bits, rounded once."""
    product = np.matmul(*(t.to(torch.float64).numpy().astype(np.longdouble) for t in (left, right)))
    return torch.from_numpy(product.astype(np.float64))


def assert_product(actual, left, right, plus=0.0):
    """By the accuracy rule, over all elements: torch's worst row may be exact by chance."""
    plain = torch.matmul(left, right) + plus
    assert actual.shape == plain.shape
    flat = (1, actual.numel())
    assert_as_accurate(actual.reshape(flat), plain.reshape(flat), (exact(left, right) + plus).reshape(flat))


SHAPES = [
    (1, 1, 1),
    (3, 0, 5),
    (0, 4, 2),
    (5, 7, 3),
    (16, 3, 32),
    (17, 64, 33),
    (100, 65, 48),
    (97, 300, 31),
    (9, 600, 130),
    (250, 257, 65),
    (1, 40, 1024),
    (333, 20, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_in_every_stride(shape, dtype, isa):
    rows, inner, columns = shape
    left, right = draw(rows, inner, dtype=dtype), draw(inner, columns, dtype=dtype, seed=1)
    spread = draw(rows, 2 * inner + 1, dtype=dtype, seed=2)[:, 1::2]
    for b in (right, right.mT.contiguous().mT):
        for a in (left, left.mT.contiguous().mT, spread):
            assert_product(products.multiply(a, b), a, b)
        alike = left[:1].expand(rows, inner) if rows else left
        assert torch.equal(products.multiply(alike, b), products.multiply(left[:1], b).expand(rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_into_a_part_of_a_matrix(dtype, isa):
    left, right = draw(70, 90, dtype=dtype), draw(90, 50, dtype=dtype, seed=1)
    for factor, adds in ((1.0, False), (-1.0, False), (-1.0, True), (0.5, True)):
        whole = draw(80, 60, dtype=dtype, seed=2)
        before, out = whole.clone(), whole[5:75, 3:53]
        assert products.multiply(left, right, out, factor, adds) is out
        assert_product(out, factor * left, right, before[5:75, 3:53] * adds)
        out.copy_(before[5:75, 3:53])
        assert torch.equal(whole, before)  # nothing beside it was written to


@pytest.mark.parametrize(("rows", "inner"), [(1111, 9), (200, 300)])
def test_no_bit_tells_the_number_of_threads_or_the_other_rows(rows, inner):
    left, right = draw(rows, inner), draw(inner, 1111, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = products.multiply(left, right)
        torch.set_num_threads(2)
        assert torch.equal(products.multiply(left, right), one)
        for part in (slice(0, 1), slice(5, 9), slice(100, 199)):
            assert torch.equal(products.multiply(left[part], right), one[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1536, 1531])  # whole vectors, and not
@pytest.mark.parametrize("shift", [0, 1])
def test_results_too_large_for_the_caches_are_those_of_their_parts(columns, shift, dtype, isa):
    """They are written past the caches, where they lie on whole vectors."""
    left, right = draw(1500, 5, dtype=dtype), draw(5, columns, dtype=dtype, seed=1)
    memory = torch.empty(1500 * columns + shift, dtype=dtype)
    out = products.multiply(left, right, memory[shift:].view(1500, columns))
    assert out.nbytes >= 8 << 20
    for first in range(0, 1500, 250):
        assert torch.equal(out[first : first + 250], products.multiply(left[first : first + 250], right))
    before = out.clone()
    assert torch.equal(products.multiply(left, right, out, 1.0, adds=True), 2 * before)


def test_stacks():
    left, right = draw(3, 20, 40), draw(3, 40, 50, seed=1)
    together = products.multiply(left, right)
    assert all(torch.equal(together[s], products.multiply(left[s], right[s])) for s in range(3))
    out = together.clone()
    products.multiply(left, right, out, -1.0, adds=True)
    assert (out == 0).all()


def test_torch_multiplies_what_the_kernels_do_not():
    left, right = draw(5, 6), draw(6, 7, seed=1)
    halves = left.bfloat16(), right.bfloat16()
    assert torch.equal(products.multiply(*halves), torch.matmul(*halves))
    assert not products.serves(*halves) and not products.serves(left, right.double())
    gradient = torch.autograd.grad(products.multiply(left.requires_grad_(), right, factor=2.0).sum(), left)[0]
    torch.testing.assert_close(gradient, 2 * right.sum(1).expand(5, 6))
    with torch.no_grad():
        assert products.serves(left, right)
    assert torch.equal(
        torch.func.vmap(products.multiply, (None, 0))(halves[0], halves[1].expand(2, 6, 7))[1], halves[0] @ halves[1]
    )
    out = torch.zeros(5, 7, dtype=torch.bfloat16)
    assert torch.equal(products.multiply(*halves, out, -1.0), -torch.matmul(*halves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (0, 3), (5, 7), (3, 16), (4, 17), (64, 100), (2, 333), (257, 33), (2, 3, 40), (0, 2, 5), (1, 1024)],
    ids=str,
)
def test_gradient_of_a_weight(shape, dtype, isa):
    u, z = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    assert_product(cpu.outer(u, z), u.mT, z)


def test_gradient_of_a_weight_in_any_strides_and_types():
    wide, tall = draw(6, 80), draw(40, 6, seed=1)
    for u, z in [(wide[:, 3:43], wide[:, 40:]), (wide[::2, :40], wide[1::2, 40:]), (tall.mT, wide[:, :40])]:
        assert_product(cpu.outer(u, z), u.mT, z)
    half = wide.bfloat16()
    assert torch.equal(cpu.outer(half, half), reference.outer(half, half))
    one = wide[:1].expand(6, 80)
    assert_product(cpu.outer(one, wide), one.mT, wide)


@pytest.fixture
def always(monkeypatch):
    """Linear layers by the compiled kernels however small they are, and whatever CPU this is."""
    monkeypatch.setattr(products, "LINEAR_FROM", 0)
    monkeypatch.setattr(products, "_is_on_amd", lambda: True)


def is_own(y):
    return "_Linear" in str(y.grad_fn) or "_Linear" in str(y.grad_fn.next_functions)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (0, 7)], ids=str)
def test_a_linear_layer_is_torchs(shape, bias, always):
    x, W = draw(*shape, dtype=torch.float64).requires_grad_(), draw(11, 7, dtype=torch.float64, seed=1).requires_grad_()
    b = draw(11, dtype=torch.float64, seed=2).requires_grad_() if bias else None
    leaves = (x, W, b) if bias else (x, W)
    ours, theirs = products.linear(x, W, b), torch.nn.functional.linear(x, W, b)
    assert is_own(ours) and not is_own(theirs)
    torch.testing.assert_close(ours, theirs)
    g = draw(*ours.shape, dtype=torch.float64, seed=3)
    for a, e in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(
        *(
            torch.autograd.grad(y.sum(), leaves)
            for y in (products.linear(x, W, b), torch.nn.functional.linear(x, W, b))
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, e)
    if x.numel():
        assert torch.autograd.gradcheck(products.linear, (x, W, b))
        assert torch.autograd.gradgradcheck(products.linear, (x, W, b))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_batch_of_gradients_of_a_linear_layer(always):
    leaves = [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(((6, 7), (5, 7), (5,)))]
    y, g = products.linear(*leaves), draw(3, 6, 5, seed=3)
    each = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in g]
    batch = torch.autograd.grad(y, leaves, g, is_grads_batched=True)
    torch.testing.assert_close(batch, tuple(map(torch.stack, zip(*each, strict=True))))


def test_a_linear_layer_by_the_accuracy_rule(always):
    x, W, b = draw(100, 300), draw(77, 300, seed=1), draw(77, seed=2)
    exact_value = exact(x, W.mT) + b.double()
    assert_as_accurate(products.linear(x, W, b), torch.nn.functional.linear(x, W, b), exact_value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_what_leaves_a_linear_layer_to_torch(always, monkeypatch):
    x, W, b = draw(6, 7), draw(5, 7, seed=1).requires_grad_(), draw(5, seed=2)
    assert is_own(products.linear(x, W, b))
    assert not is_own(products.linear(x.bfloat16(), W.bfloat16()))
    with torch.autocast("cpu"):
        assert products.linear(x, W, b).dtype == torch.bfloat16
    each = torch.func.vmap(torch.func.grad(lambda W, x: products.linear(x, W, b).sin().sum()), (None, 0))(W.detach(), x)
    torch.testing.assert_close(each.sum(0), torch.autograd.grad(products.linear(x, W, b).sin().sum(), W)[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(products.linear(dual, W, b)).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ W.mT)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        products.linear(x, W.detach().mT.contiguous())
    monkeypatch.setattr(products, "LINEAR_FROM", 8e6)
    assert not is_own(products.linear(x, W, b))
