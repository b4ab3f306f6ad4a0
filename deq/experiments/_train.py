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
) -> Tensor:
    """Minimise the mean squared error of every seed on fresh batches; returns the loss of the last batch (S,).

    batch: x (S, B, d) and y (S, B). The learning rate falls from ``rate`` to ``rate * final_share`` along a cosine.
    observe(step): called without gradients before step ``step`` for every step in ``checkpoints``; ``steps`` is the end.
    The losses of the seeds are added, and Adam works entry by entry, so that no seed sees another.
    """
    optimiser = torch.optim.Adam(net.parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=rate * final_share)
    due = set(checkpoints)
    loss = torch.empty(0)
    for step in range(steps):
        if step in due:
            with torch.no_grad():
                observe(step)
        x, y = batch()
        loss = (net(x) - y).square().mean(1)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        schedule.step()
    if steps in due:
        with torch.no_grad():
            observe(steps)
    return loss.detach()
