"""The trainer of all experiments: Adam with a cosine schedule, all seeds in one go."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._nets import SeededNet


def train(
    net: SeededNet,
    batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float = 1e-2,
    final_share: float = 0.02,
    checkpoints: Sequence[int] = (),
    observe: Callable[[int], None] = lambda step: None,
) -> dict[int, int]:
    """Minimise the mean squared error of every seed on fresh batches.

    Returns the seeds that met a gradient that was not finite, with the first such step; it counted as zero.

    batch: x (S, B, d) and y (S, B). The learning rate falls from ``rate`` to ``rate * final_share`` on a cosine.
    observe(step): called without gradients before every step in ``checkpoints``; step ``steps`` is the end.
    The losses of the seeds are added, and Adam works entry by entry, so that no seed sees another.
    """
    optimiser = torch.optim.Adam(net.parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=rate * final_share)
    due = set(checkpoints)
    overflowed: dict[int, int] = {}
    for step in range(steps):
        if step in due:
            with torch.no_grad():
                observe(step)
        x, y = batch()
        optimiser.zero_grad()
        (net(x) - y).square().mean(1).sum().backward()
        if not torch.stack([p.grad.sum() for p in net.parameters]).sum().isfinite():
            _drop_overflow(net, overflowed, step)
        optimiser.step()
        schedule.step()
    if steps in due:
        with torch.no_grad():
            observe(steps)
    return overflowed


def _drop_overflow(net: SeededNet, overflowed: dict[int, int], step: int) -> None:
    """Zero every gradient of the seeds that have one that is not finite."""
    finite = torch.stack([p.grad.flatten(1).isfinite().all(1) for p in net.parameters]).all(0)
    for seed in (~finite).nonzero().flatten().tolist():
        overflowed.setdefault(seed, step)
        for p in net.parameters:
            p.grad[seed] = 0
