"""Mixing weights of the kernels, in the interpreter, against a least squares problem with the same regulariser."""

import pytest
import torch
import triton
import triton.language as tl

from deq import reference
from deq.kernels import anderson

B, m = 8, 20
mixing_weights = anderson.mixing_weights


@triton.jit
def weights_kernel(gram_ptr, weights_ptr, count_ptr, newest, B, DEPTH: tl.constexpr):
    b = tl.arange(0, 8)
    count = tl.load(count_ptr + b)
    weights = mixing_weights(gram_ptr + b, B, b < B, count, newest, DEPTH)
    for i in tl.static_range(DEPTH):
        tl.store(weights_ptr + i * B + b, weights[i])


def expected(residuals, count):
    """By torch, newest first: of the most residuals whose weights can be trusted."""
    for size in range(count, 1, -1):
        G = residuals[:size]
        norms = G.norm(dim=-1)
        if not (norms > 0).all():
            continue
        G = G / norms.unsqueeze(-1)
        L, info = torch.linalg.cholesky_ex(G @ G.mT + 10 * 2.0**-23 * torch.eye(size, dtype=torch.float64))
        a = torch.cholesky_solve((1 / norms).unsqueeze(-1), L).squeeze(-1) / norms
        a = a / a.sum()
        if info == 0 and a.abs().sum() < reference.MAX_WEIGHT:
            return a
    return torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(("depth", "newest"), [(5, 2), (5, 0), (2, 1)])
def test_weights(depth, newest):
    generator = torch.Generator().manual_seed(depth)
    window = torch.randn(depth, B, m, dtype=torch.float64, generator=generator)
    window *= 10.0 ** torch.arange(-16, 16, 4, dtype=torch.float64).view(1, B, 1)  # of any scale
    window[1, 5] = window[0, 5] * (1 + 1e-9)  # nearly parallel
    window[:, 6] = 0.0  # nothing left to do
    window[(newest - 1) % depth, 7] = 0.0  # the last but one was exact
    count = torch.tensor([1, 2, 3, 4, 5, 5, 5, 5], dtype=torch.int32).clamp(max=depth)
    gram = torch.einsum("ibm,jbm->ijb", window, window).contiguous()
    weights = torch.empty(depth, B, dtype=torch.float64)
    weights_kernel[(1,)](gram, weights, count, newest, B, DEPTH=depth)
    for b in range(B):
        rows = torch.stack([window[(newest - age) % depth, b] for age in range(depth)])
        exact = expected(rows, int(count[b]))
        torch.testing.assert_close(weights[: len(exact), b], exact, rtol=1e-6, atol=1e-6)
        assert (weights[len(exact) :, b] == 0).all()
