"""The fused cell, run by Triton's interpreter, against its definition in deq/reference.py."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from close import assert_as_accurate
from problems import gaussian

from deq import reference
from deq.activations import ACTIVATIONS
from deq.kernels import activations, cell
from deq.kernels import tiles as shapes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SMALL = shapes.Tiles(16, 16, 16, 4, 2)  # several tiles in every direction at sizes that the interpreter can bear
names = pytest.mark.parametrize("activation", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(m, B, dtype=torch.float32, seed=0):
    """W, c, z of an iteration under way."""
    W, c, g = gaussian(m, B, dtype, seed, scale=0.9)
    return W, 2 * c, g


def rows(x):
    """One row a sample, for the accuracy rule."""
    return x.unsqueeze(-1)


def assert_norms_as_accurate(step2, size2, z, plain, exact):
    """The partial sums add up to the norms of ``exact - z`` and ``exact``; both are judged against the size, because a
    small step is a difference in torch and here alike."""
    norms = torch.stack((step2, size2), -1).sum(0).sqrt()
    assert norms.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    theirs = torch.stack(((plain - z).norm(dim=-1), plain.norm(dim=-1)), -1)
    truth = torch.stack(((exact - z.double()).norm(dim=-1), exact.norm(dim=-1)), -1)
    assert_as_accurate(norms, theirs, truth)


def check_cell(W, c, z, activation, **options):
    plain = reference.cell(W, c, z, activation)
    exact = reference.cell(W.double(), c.double(), z.double(), activation)
    out, step2, size2 = cell.cell(z, W, c, activation, **options)
    assert out.dtype == z.dtype and out.is_contiguous()
    assert_as_accurate(out, plain, exact)
    assert_norms_as_accurate(step2, size2, z, plain, exact)
    return out, step2, size2


@triton.jit
def pointwise_kernel(x_ptr, value_ptr, slope_ptr, NUMBER: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(value_ptr + i, activations.value(x, NUMBER))
    tl.store(slope_ptr + i, activations.derivative(x, NUMBER))


def points(dtype):
    fine = torch.logspace(-12, 4, 1024, dtype=torch.float64)
    return torch.cat((torch.linspace(-30, 30, 2048, dtype=torch.float64), fine, -fine)).to(dtype)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activation_at_every_point(activation, dtype):
    entry, x = ACTIVATIONS[activation], points(dtype)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    pointwise_kernel[(1,)](x, value, slope, NUMBER=entry.number, SIZE=x.numel())
    if dtype == torch.float64:  # there is no wider type to judge by: as tests/test_activations.py
        torch.testing.assert_close(value, entry.value(x), rtol=16 * 2.2e-16, atol=1e-16)
        torch.testing.assert_close(slope, entry.derivative(x), rtol=16 * 2.2e-16, atol=4 * 2.2e-16)
        return
    exact = entry.value(x.double())
    normal = exact.abs() > 1e-30  # below, float32 loses digits by itself
    assert_as_accurate(*(rows(y[normal]) for y in (value, entry.value(x), exact)))
    # Derivatives cancel in torch and here alike: judged against the largest derivative, which is about 1.
    exact, plain = entry.derivative(x.double()), entry.derivative(x)
    ulp = torch.finfo(dtype).eps
    assert (slope - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2 * ulp


@names
def test_activation_of_what_is_not_finite(activation):
    x = torch.tensor([torch.nan, torch.inf, 3e38, -3e38])
    value, slope = torch.empty_like(x), torch.empty_like(x)
    with np.errstate(over="ignore", invalid="ignore"):
        pointwise_kernel[(1,)](x, value, slope, NUMBER=ACTIVATIONS[activation].number, SIZE=4)
    expected = ACTIVATIONS[activation].value(x)
    assert torch.equal(value.isnan(), expected.isnan()) and value[2:].isfinite().all() and slope[2:].isfinite().all()


@names
@dtypes
def test_cell(activation, dtype):
    check_cell(*problem(37, 19, dtype), activation, tiles=SMALL)


@names
@dtypes
def test_derivative(activation, dtype):
    W, c, z = problem(37, 19, dtype)
    slope = cell.derivative(z, W, c, activation, tiles=SMALL)
    exact = reference.derivative(W.double(), c.double(), z.double(), activation)
    assert slope.dtype == dtype
    assert_as_accurate(slope, reference.derivative(W, c, z, activation), exact)


@dtypes
def test_adjoint_cell(dtype):
    W, g, u = problem(37, 19, dtype)
    d = torch.rand(19, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, step2, size2 = cell.adjoint_cell(u, W.mT, d, g, tiles=SMALL)
    plain = d * (u @ W + g)
    exact = d.double() * (u.double() @ W.double() + g.double())
    assert_as_accurate(out, plain, exact)
    assert_norms_as_accurate(step2, size2, u, plain, exact)


@pytest.mark.parametrize(("m", "B"), [(1, 1), (1, 33), (17, 5), (64, 33), (100, 1), (100, 16), (333, 2)])
@dtypes
def test_any_width_and_batch(m, B, dtype):
    check_cell(*problem(m, B, dtype), "tanh")


@hypothesis.given(
    m=st.integers(1, 40),
    B=st.integers(0, 40),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_any_problem(m, B, activation, dtype, seed):
    check_cell(*problem(m, B, dtype, seed), activation, tiles=SMALL)


@pytest.mark.parametrize(
    ("dtype", "precision", "tiles"),
    [
        (dtype, precision, tiles)
        for dtype in shapes.DTYPES
        for precision in (shapes.PRECISIONS if dtype == "float32" else shapes.PRECISIONS[:1])
        for tiles in shapes.TILES[dtype if precision == "ieee" else "tf32"]
    ],
)
def test_every_tile(dtype, precision, tiles):
    W, c, z = problem(tiles.units + 24, tiles.samples + 3, getattr(torch, dtype))
    check_cell(W, c, z, "silu", precision=precision, tiles=tiles)


def test_more_samples_than_a_band():
    assert cell.BAND.value * SMALL.samples < 150
    check_cell(*problem(37, 150), "sigmoid", tiles=SMALL)


def test_empty_batch():
    W, c, z = problem(5, 0)
    out, step2, size2 = check_cell(W, c, z, "relu")
    assert out.shape == (0, 5) and step2.shape == size2.shape == (1, 0)
    assert cell.derivative(z, W, c, "relu").shape == (0, 5)
    assert cell.adjoint_cell(z, W.mT, z, c)[0].shape == (0, 5)


@pytest.mark.parametrize("m", [32, 37])  # rows are read in pieces, or element by element
def test_any_strides(m):
    B = 19
    W, c, z = problem(m, B)
    expected = cell.cell(z, W, c, "tanh", tiles=SMALL)

    def surrounded(x):
        """The same values as a view into memory full of NaN, at an odd address."""
        whole = torch.full((x.shape[0] + 5, x.shape[1] + 7), torch.nan)
        whole[3 : 3 + x.shape[0], 1 : 1 + x.shape[1]] = x
        return whole[3 : 3 + x.shape[0], 1 : 1 + x.shape[1]]

    def transposed(x):
        return x.mT.contiguous().mT

    def every_other(x):
        whole = torch.full((2 * x.shape[0], 2 * x.shape[1]), torch.nan)
        whole[::2, ::2] = x
        return whole[::2, ::2]

    for view in (surrounded, transposed, every_other):
        for actual, want in zip(cell.cell(view(z), view(W), view(c), "tanh", tiles=SMALL), expected, strict=True):
            assert torch.equal(actual, want), view.__name__
        g = cell.adjoint_cell(view(z), view(W), view(c), view(z), tiles=SMALL)
        for actual, want in zip(g, cell.adjoint_cell(z, W, c, z, tiles=SMALL), strict=True):
            assert torch.equal(actual, want), view.__name__
    shared = c[:1].expand(B, m)
    assert torch.equal(cell.cell(z, W, shared, "tanh")[0], cell.cell(z, W, shared.contiguous(), "tanh")[0])


def test_a_sample_is_its_own():
    W, c, z = problem(37, 40)
    expected = cell.cell(z, W, c, "tanh", tiles=SMALL)
    z[7] = torch.nan
    c[21] = torch.inf
    others = [b for b in range(40) if b not in (7, 21)]
    out, step2, size2 = cell.cell(z, W, c, "tanh", tiles=SMALL)
    assert torch.equal(out[others], expected[0][others])
    assert torch.equal(step2[:, others], expected[1][:, others])
    assert torch.equal(size2[:, others], expected[2][:, others])
    assert out[7].isnan().all() and step2[:, 7].isnan().all() and out[21].eq(1).all()


@pytest.mark.parametrize("exponent", [-40, 40])
def test_scaling_the_injection_scales_everything(exponent):
    W, c, z = problem(37, 19)
    scale = 2.0**exponent
    for activation in ("relu", "leaky_relu", "identity"):
        out, step2, size2 = cell.cell(z, W, c, activation, tiles=SMALL)
        scaled = cell.cell(scale * z, W, scale * c, activation, tiles=SMALL)
        for actual, expected in zip(scaled, (scale * out, scale**2 * step2, scale**2 * size2), strict=True):
            assert torch.equal(actual, expected)


def test_solves_and_differentiates():
    """Iterated, the three functions give the equilibrium and the implicit gradient, as fast and as well as in torch."""
    W, c, g = gaussian(37, 5, scale=0.3)
    z = plain = torch.zeros_like(c)
    for _ in range(40):
        z, step2, _ = cell.cell(z, W, c, "tanh")
        plain = reference.cell(W, c, plain, "tanh")
    W64, c64, g64 = W.double(), c.double(), g.double()
    exact, *_ = reference.solve(W64, c64, "tanh", tol=1e-14, max_iter=500)
    assert_as_accurate(z, plain, exact)
    assert step2.sum(0).sqrt().max() < 1e-6

    d, plain_d = cell.derivative(z, W, c, "tanh"), reference.derivative(W, c, plain, "tanh")
    u = plain_u = torch.zeros_like(g)
    for _ in range(40):
        u, *_ = cell.adjoint_cell(u, W.mT, d, g)
        plain_u = plain_d * (plain_u @ W + g)
    dW, dc = reference.implicit_gradient(W64, c64, exact, g64, "tanh")
    assert_as_accurate(u, plain_u, dc)
    assert_as_accurate(u.mT @ z, plain_u.mT @ plain, dW)


@hypothesis.given(m=st.integers(1, 9000), B=st.integers(0, 5000), more=st.integers(0, 5000))
@hypothesis.settings(deadline=None)
def test_tiles_grow_with_the_batch_and_waste_no_rows(m, B, more):
    for dtype in shapes.DTYPES:
        for precision in shapes.PRECISIONS if dtype == "float32" else shapes.PRECISIONS[:1]:
            ladder = shapes.TILES[dtype if precision == "ieee" else "tf32"]
            tiles = shapes.cell_tiles(B, m, dtype, precision)
            assert ladder.index(tiles) >= ladder.index(shapes.cell_tiles(B + more, m, dtype, precision))
            assert tiles.samples < 2 * max(B, 9)
            assert m % 16 == 0 or tiles.samples <= 32


def test_large_products_get_large_tiles():
    assert shapes.cell_tiles(4096, 4096, "bfloat16").samples == 128
    assert shapes.cell_tiles(1, 4096, "bfloat16").samples == 16
    assert shapes.cell_tiles(256, 2048, "bfloat16").samples >= 64  # what wgmma needs


GOOD = dict(zip(("W", "c", "z"), problem(6, 4), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(6)}, r"z must have shape \(B, m\) with m >= 1; got \(6,\)"),
        ({"z": torch.zeros(4, 0)}, r"z must have shape \(B, m\) with m >= 1; got \(4, 0\)"),
        ({"W": torch.zeros(6, 5)}, r"W must have shape \(6, 6\) beside z \(4, 6\); got \(6, 5\)"),
        ({"c": torch.zeros(6)}, r"c must have shape \(4, 6\) beside z \(4, 6\); got \(6,\)"),
        ({"W": torch.zeros(6, 6, dtype=torch.bfloat16)}, "W must be float32 like z; got bfloat16"),
        ({"c": torch.zeros(4, 6, dtype=torch.float64)}, "c must be float32 like z; got float64"),
        ({"z": torch.zeros(4, 6, dtype=torch.int32)}, "z must be of dtype float32, .*; got int32"),
        ({"c": torch.zeros(4, 6, device="meta")}, "c must be on cpu like z; got meta"),
        ({"activation": "rlu"}, "activation must be one of identity, .*; got 'rlu'"),
        ({"precision": "tf33"}, "precision must be one of 'ieee', 'tf32x3', 'tf32'; got 'tf33'"),
        ({k: v.double() for k, v in GOOD.items()} | {"precision": "tf32"}, "precision='tf32' .* float32; z is float64"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        cell.cell(**({"activation": "relu"} | GOOD | change))
    with pytest.raises(ValueError, match=message):
        cell.derivative(**({"activation": "relu"} | GOOD | change))


def test_wrong_arguments_of_the_adjoint_are_named():
    good = {"u": GOOD["z"], "A": GOOD["W"], "d": GOOD["c"], "g": GOOD["c"]}
    for name, size in (("A", "6, 6"), ("d", "4, 6"), ("g", "4, 6")):
        with pytest.raises(ValueError, match=rf"{name} must have shape \({size}\) beside u \(4, 6\); got \(3, 3\)"):
            cell.adjoint_cell(**(good | {name: torch.zeros(3, 3)}))
        with pytest.raises(ValueError, match=f"{name} must be float32 like u; got float16"):
            cell.adjoint_cell(**(good | {name: good[name].half()}))


def test_without_interpreter_and_gpu_the_error_says_so(monkeypatch):
    monkeypatch.setattr(cell, "INTERPRETED", tl.constexpr(False))
    with pytest.raises(ValueError, match=r"z must be on a CUDA device, .* got cpu"):
        cell.cell(**GOOD, activation="relu")
