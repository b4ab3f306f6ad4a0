"""What keeps an equilibrium model trainable: penalties on the Jacobian, its spectral radius, losses along the way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def jacobian_penalty(image: Tensor, point: Tensor, samples: int = 1, create_graph: bool = True) -> Tensor:
    """Estimate of ``||J||_F^2 / n``, J the Jacobian of ``image`` with respect to ``point`` of n elements.

    Hutchinson's estimator with Gaussian probes: the mean over ``samples`` of ``||J^T v||^2 / n``; unbiased, as every
    product of two different probes' elements has mean zero (Bai et al. 2021, "Stabilizing equilibrium models").

    image: f(point), computed with gradients from ``point``, which must require one. create_graph: whether the penalty
    itself is to be differentiated, as training with it needs. Returns a scalar, float32 for a point of 16 bits, 0 where
    point has no elements. Raises ValueError if samples is no positive integer.
    """
    _check_positive("samples", samples)
    total = point.new_zeros((), dtype=torch.promote_types(point.dtype, torch.float32))  # 16 bits do not hold a sum
    for _ in range(samples):
        probe = torch.randn_like(image)
        product = _product(image, point, probe, create_graph)
        total = total + product.to(total.dtype).square().sum()
    return total / max(1, samples * point.numel())


def spectral_radius(image: Tensor, point: Tensor, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Largest modulus of an eigenvalue of every sample's Jacobian of ``image`` (B, ...) with respect to ``point``.

    Power iteration on vector-Jacobian products; the radius is the geometric mean growth over the second half of it,
    which is right for complex pairs too (a Rayleigh quotient of a rotation is zero). Returns it (B,), and the last
    vector. Raises ValueError if iterations is no positive integer.
    """
    _check_positive("iterations", iterations)
    v = torch.randn_like(point)
    B = point.shape[0]
    norms = []
    v = v / _row_norm(v)
    for _ in range(iterations):
        v = _product(image, point, v)
        size = _row_norm(v)
        norms.append(size.reshape(B))
        v = v / torch.where(size > 0, size, 1.0)
    return torch.stack(norms[len(norms) // 2 :]).log().mean(0).exp(), v


def _product(image: Tensor, point: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """``J^T v``: zeros where ``image`` does not depend on ``point``."""
    options = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
    return torch.autograd.grad(image, point, v, **options)[0]


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")


def _row_norm(v: Tensor) -> Tensor:
    if v.dim() == 1:
        return v.abs()
    dims = tuple(range(1, v.dim()))
    if v.numel() == 0:  # which has no largest element
        return v.sum(dims, keepdim=True)
    largest = v.abs().amax(dims, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)  # squares of v may be beyond its dtype
    return torch.linalg.vector_norm(v / unit, dim=dims, keepdim=True) * unit


def correction_loss(
    loss: Callable[..., Tensor], states: Sequence[object], *targets: object, decay: float = 0.8
) -> Tensor:
    """``sum_k decay^(n-1-k) loss(state_k, *targets)`` over n states on the way to the fixed point.

    The fixed-point correction of DEQ-Flow (Bai et al. 2022): a loss on states of the trajectory pulls them towards the
    answer as well. states: such as phantom-gradient states, the last being the fixed point.
    """
    n = len(states)
    if n == 0:
        raise ValueError("states must not be empty")
    terms = [decay ** (n - 1 - k) * loss(state, *targets) for k, state in enumerate(states)]
    return torch.stack([torch.as_tensor(term) for term in terms]).sum()
