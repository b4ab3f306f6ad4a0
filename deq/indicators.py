"""Cheap looks at a weight, from which :func:`deq.plan.fit` chooses how to solve with it."""

import torch
from torch import Tensor

from .backends.cpu import increments_here
from .cache import remembered
from .plan import INCREMENTS_FROM, LARGE_WEIGHT, SLOW_FROM, Plan, fit, is_cheap
from .solvers import cayley

LOOK_AT_ROWS = 64


def fitted(plan: Plan, W: Tensor, c: Tensor, activation: str) -> Plan:
    """The plan of an automatic solve, fitted to W (m, m) or (S, m, m) and to the shape of c (B, m) or (S, B, m).

    Nothing here looks at the values of c: what a sample gets must not depend on its batch mates.
    """
    width, batch, frozen = W.shape[-1], c.shape[-2], not (torch.is_grad_enabled() and W.requires_grad)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return fit(plan, width, batch, False, False, frozen, "native")
    increments = increments_here() if plan.backend == "cpu" and plan.precision == "float32" else "native"
    rows = W.detach()[..., :: max(1, width // LOOK_AT_ROWS), :]  # evenly spread: enough to tell the size of W
    size = float(torch.linalg.vector_norm(rows, dtype=torch.float32 if W.element_size() < 4 else None))
    large = size * size > LARGE_WEIGHT**2 * (rows.numel() // width)
    slow = False
    worth_knowing = plan.reflects and frozen and not large and increments != "native" and width >= INCREMENTS_FROM
    if worth_knowing and W.dim() == 2 and is_cheap(width, batch, frozen):
        slow = _expected(W, activation, plan.tol) >= SLOW_FROM
    return fit(plan, width, batch, large, slow, frozen, increments)


def _expected(W: Tensor, activation: str, tol: float) -> float:
    """Evaluations that the plain map is expected to need for injections like noise: a property of W, not of a batch."""

    def make() -> float:
        wide = W.detach().to(torch.float64 if W.dtype == torch.float64 else torch.float32)
        noise = torch.randn(cayley.PROBE_SAMPLES, W.shape[-1], generator=torch.Generator().manual_seed(0))
        return cayley.predict(wide, noise.to(wide), activation, tol)

    return remembered(W, ("evaluations", activation, tol), make)
