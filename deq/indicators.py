"""Cheap looks at a weight, from which :func:`deq.plan.fit` chooses how to solve with it."""

import torch
from torch import Tensor

from . import _library
from .plan import LARGE_WEIGHT, Plan, fit

# Rows looked at, evenly spread: enough to tell the size of W. The compiled engine looks itself (csrc/cpu/look.h):
# tensor operations would take 15 us of a solve, and 100 where caches are cold.
LOOK_AT_ELEMENTS, LEAST_ROWS = 4096, 8
MOST_KEPT = 1024  # fitted plans of one plan: batches may be of any size


def fitted(plan: Plan, W: Tensor, c: Tensor, frozen: bool, large: bool | None = None) -> Plan:
    """The plan of an automatic solve, fitted to W (m, m) or (S, m, m) and to the shape of c (B, m) or (S, B, m).

    frozen: whether W is not being trained; large: whether it is, see :func:`deq.plan.fit`, looked at here or by the
    backend if None. Nothing looks at the values of c: what a sample gets must not depend on its batch mates.
    """
    increments = "native"
    if torch._C._are_functorch_transforms_active():
        large = False
    elif plan.backend != "cpu":
        large = is_large(W) if large is None else large
    elif plan.precision == "float32":
        increments = _library.increments()
    key = W.shape[-1], c.shape[-2], large, frozen, increments
    found = plan.kept.get(key)
    if found is None:
        if len(plan.kept) >= MOST_KEPT:
            plan.kept.clear()
        found = plan.kept[key] = fit(plan, *key)
    return found


def is_large(W: Tensor) -> bool:
    """Whether W (m, m) or (S, m, m) is, by some of its rows."""
    width = W.shape[-1]
    wanted = max(LEAST_ROWS, LOOK_AT_ELEMENTS // width)
    rows = W.detach()[..., :: max(1, width // wanted), :]
    size = float(torch.linalg.vector_norm(rows, dtype=torch.float32 if W.element_size() < 4 else None))
    return size * size > LARGE_WEIGHT**2 * (rows.numel() // width)
