"""Problems and the plain torch solution they are held against."""

import torch
from torch import Tensor

from deq.activations import ACTIVATIONS


def gaussian(m: int, B: int, dtype=torch.float32, seed: int = 0, scale: float = 0.45) -> tuple[Tensor, Tensor, Tensor]:
    """W (m, m) with entries N(0, scale^2 / m), injection c and loss gradient g (B, m)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(m, m) * (scale / m**0.5), draw(B, m), draw(B, m)


def contraction(rate=0.9, m=12, B=6, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """W (m, m) of that 2-norm, which needs a gradient, and injections (B, m)."""
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(m, m, generator=generator, dtype=torch.float64)
    W = (W * (rate / torch.linalg.matrix_norm(W, 2))).to(dtype)
    return W.requires_grad_(), torch.randn(B, m, generator=generator, dtype=torch.float64).to(dtype)


def _largest_residual(new: Tensor, old: Tensor) -> float:
    size = new.norm(dim=-1)
    step = (new - old).norm(dim=-1)
    return float(torch.where(step > 0, step / size, step).max()) if new.numel() else 0.0


def torch_loop(W: Tensor, c: Tensor, activation: str = "relu", tol: float = 1e-5, max_iter: int = 5000) -> Tensor:
    """What a user writes by hand: iterate the batch until its worst sample has converged."""
    act = ACTIVATIONS[activation].value
    z = torch.zeros_like(c)
    for _ in range(max_iter):
        z, old = act(z @ W.mT + c), z
        if _largest_residual(z, old) <= tol:
            break
    return z


def torch_adjoint(W: Tensor, c: Tensor, z: Tensor, g: Tensor, activation: str = "relu", tol: float = 1e-5) -> Tensor:
    """The same for ``u = D (g + W^T u)``."""
    d = ACTIVATIONS[activation].derivative(z @ W.mT + c)
    u = torch.zeros_like(g)
    for _ in range(5000):
        u, old = d * (u @ W + g), u
        if _largest_residual(u, old) <= tol:
            break
    return u


def _each_sample(f, like: Tensor, tol: float) -> Tensor:
    """Iterate f from zero; a sample keeps its first iterate that has converged."""
    z, left = torch.zeros_like(like), torch.ones(len(like), dtype=torch.bool, device=like.device)
    for _ in range(5000):
        new = f(z)
        step, size = (new - z).norm(dim=-1), new.norm(dim=-1)
        z = torch.where(left[:, None], new, z)
        left = left & ~(step <= tol * size)
        if not left.any():
            break
    return z


def sample_loop(W: Tensor, c: Tensor, activation: str = "relu", tol: float = 1e-5) -> Tensor:
    """:func:`torch_loop` in which every sample stops by itself, as the engine's do. Where all go on for the worst, the
    errors of the others are two to ten times below what the tolerance asks."""
    act = ACTIVATIONS[activation].value
    return _each_sample(lambda z: act(z @ W.mT + c), c, tol)


def sample_adjoint(W: Tensor, c: Tensor, z: Tensor, g: Tensor, activation: str = "relu", tol: float = 1e-5) -> Tensor:
    """The same of :func:`torch_adjoint`."""
    d = ACTIVATIONS[activation].derivative(z @ W.mT + c)
    return _each_sample(lambda u: d * (u @ W + g), g, tol)


def exact(W: Tensor, c: Tensor, activation: str = "relu") -> Tensor:
    """The equilibrium in float64, to a residual of 20 machine epsilons."""
    return torch_loop(W.double(), c.double(), activation, tol=4e-15)
