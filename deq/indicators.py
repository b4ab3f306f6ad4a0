"""Cheap looks at a weight, from which :func:`deq.plan.fit` chooses how to solve with it."""

import torch
from torch import Tensor

from .backends.cpu import increments_here
from .plan import LARGE_WEIGHT, Plan, fit

# Rows looked at, evenly spread: enough to tell the size of W. They are copied first, because a norm of rows apart is
# taken element by element (64 rows of 256: 18 us, 16 copied: 7).
LOOK_AT_ELEMENTS, LEAST_ROWS = 4096, 8


def fitted(plan: Plan, W: Tensor, c: Tensor) -> Plan:
    """The plan of an automatic solve, fitted to W (m, m) or (S, m, m) and to the shape of c (B, m) or (S, B, m).

    Nothing here looks at the values of c: what a sample gets must not depend on its batch mates.
    """
    width, batch, frozen = W.shape[-1], c.shape[-2], not (torch.is_grad_enabled() and W.requires_grad)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return fit(plan, width, batch, False, frozen, "native")
    increments = increments_here() if plan.backend == "cpu" and plan.precision == "float32" else "native"
    wanted = max(LEAST_ROWS, LOOK_AT_ELEMENTS // width)
    rows = W.detach()[..., :: max(1, width // wanted), :].contiguous()
    size = float(torch.linalg.vector_norm(rows, dtype=torch.float32 if W.element_size() < 4 else None))
    large = size * size > LARGE_WEIGHT**2 * (rows.numel() // width)
    return fit(plan, width, batch, large, frozen, increments)
