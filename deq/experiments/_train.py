"""The trainer of all experiments: Adam with a cosine schedule, all seeds in one go."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..solution import ConvergenceWarning
from ._dense_nets import statuses
from ._nets import SeededNet

_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
Schedule = Callable[[float], float]  # finished fraction of the steps -> factor of the learning rate
Loss = Callable[[Tensor, Tensor], Tensor]  # output and target (S, B) -> (S, B)


@dataclass
class Log:
    """What went wrong in training; by seed, and empty where all is well.

    overflowed: first step with a gradient that was not finite; it counted as zero. ill_posed: first step, statuses
    there, and number of steps at which samples had no equilibrium that could be found: they were left out of the loss.
    adjoint: first step at which a gradient was not solved to tolerance, with the engine's own words.
    """

    overflowed: dict[int, int] = field(default_factory=dict)
    ill_posed: dict[int, dict] = field(default_factory=dict)
    adjoint: tuple[int, str] | None = None

    def sentences(self, name: str) -> list[str]:
        """For the notes of a report."""
        lines = []
        if self.overflowed:
            lines.append(f"{name}: a gradient overflowed, seed: step {self.overflowed}.")
        if self.ill_posed:
            seed, first = min(self.ill_posed.items(), key=lambda item: item[1]["step"])
            lines.append(
                f"{name}: ill-posed in {len(self.ill_posed)} seed(s), first at step {first['step']} (seed {seed}: "
                f"{first['status']}); such samples were left out of the loss."
            )
        if self.adjoint:
            lines.append(f"{name}: step {self.adjoint[0]} was the first whose gradient is inexact: {self.adjoint[1]}.")
        return lines


def cosine(final: float = 0.02) -> Schedule:
    """From 1 to ``final`` on half a cosine."""
    return lambda done: final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def hold_then_fall(hold: float, final: float = 0.01) -> Schedule:
    """1 for this fraction of the steps, then on a line towards 0, but not below ``final``."""
    return lambda done: 1.0 if done < hold else max(final, (1 - done) / (1 - hold))


def square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()


def _slope(loss: Loss, output: Tensor, target: Tensor, weight: Tensor | float) -> Tensor:
    """Gradient by ``output`` of the sum of ``weight`` (S, B) or a number times the loss. That of :func:`square` in two
    operators instead of a graph of a dozen."""
    if loss is square:
        return torch.sub(output, target).mul_(2 * weight)
    leaf = output.requires_grad_()
    losses = loss(leaf, target)
    (slope,) = torch.autograd.grad(losses, leaf, torch.as_tensor(weight, dtype=losses.dtype).expand_as(losses))
    return slope


def train(
    net: SeededNet,
    batch: Callable[[], tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float = 1e-2,
    schedule: Schedule | None = None,
    clip: float | None = None,
    loss: Loss = square,
    checkpoints: Sequence[int] = (),
    observe: Callable[[int], None] = lambda step: None,
    after: Callable[[], None] | None = None,
) -> Log:
    """Minimise the mean ``loss`` of every seed over the batches that ``batch()`` gives.

    batch: x (S, B, d) and y (S, B). schedule: factor of ``rate`` by the finished fraction of steps, a cosine if None.
    clip: largest 2-norm of a seed's gradient. observe(step): called without gradients before every step in
    ``checkpoints``; step ``steps`` is the end. after(): called after every update, for constraints on the weights.
    The losses of the seeds are added, clipping is by seed, and Adam works entry by entry, so that no seed sees another.
    """
    together = _one_vector(net.parameters)
    adam = Adam(together)
    factor = schedule or cosine()
    due, log = set(checkpoints), Log()
    for step in range(steps):
        if step in due:
            with torch.no_grad():
                observe(step)
        x, y = batch()
        together.grad.zero_()
        output = net(x)
        slope = _slope(loss, output.detach(), y, _well_posed_weight(net, output, log, step))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            output.backward(slope)
        if caught and log.adjoint is None:
            log.adjoint = (step, str(caught[0].message).partition(". Their")[0])
        if not math.isfinite(together.grad.sum()):
            _drop_overflow(net, log.overflowed, step)
        if clip is not None:
            _clip(net, clip)
        adam.step(rate * factor(step / steps))
        if after is not None:
            after()
    if steps in due:
        with torch.no_grad():
            observe(steps)
    return log


class Adam:
    """Kingma and Ba 2015 with their constants, on one vector: the kernel of ``torch.optim.Adam(fused=True)`` without
    its 30 us of preparations, a quarter of a step of small nets."""

    def __init__(self, parameters: Tensor):
        """parameters: with a gradient."""
        self.parameters = parameters
        self.first, self.second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.steps = torch.zeros((), dtype=torch.float32, device=parameters.device)

    def step(self, rate: float) -> None:
        p = self.parameters
        self.steps += 1
        torch._fused_adam_([p], [p.grad], [self.first], [self.second], [], [self.steps], lr=rate, **_ADAM)


def _one_vector(parameters: Sequence[Tensor]) -> Tensor:
    """A vector with a gradient, both of which hold those of ``parameters`` from now on: what is done entry by entry is
    then done once, not for every small tensor. A gradient is zero until there is one."""
    together = torch.cat([p.detach().flatten() for p in parameters])
    together.grad = torch.zeros_like(together)
    sizes = [p.numel() for p in parameters]
    for p, values, gradient in zip(parameters, together.split(sizes), together.grad.split(sizes), strict=True):
        p.data, p.grad = values.view(p.shape), gradient.view(p.shape)
    return together


def _well_posed_weight(net: SeededNet, output: Tensor, log: Log, step: int) -> Tensor | float:
    """Of every sample in the mean of its seed over the samples whose equilibrium was found: (S, B), or one number."""
    status = net.status()
    if status is None or not status.any():  # 0 is CONVERGED
        return 1 / max(output.shape[1], 1)
    failed = net.failed()
    for seed in failed.any(1).nonzero().flatten().tolist():
        entry = log.ill_posed.setdefault(
            seed, {"step": step, "status": statuses(status[seed], failed[seed]), "steps": 0}
        )
        entry["steps"] += 1
    found = (~failed).to(output.dtype)
    return found / found.sum(1, keepdim=True).clamp(min=1)


def _drop_overflow(net: SeededNet, overflowed: dict[int, int], step: int) -> None:
    """Zero every gradient of the seeds that have one that is not finite."""
    finite = torch.stack([p.grad.flatten(1).isfinite().all(1) for p in net.parameters]).all(0)
    for seed in (~finite).nonzero().flatten().tolist():
        overflowed.setdefault(seed, step)
        for p in net.parameters:
            p.grad[seed] = 0


def _clip(net: SeededNet, clip: float) -> None:
    norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in net.parameters]).norm(dim=0)
    scale = (clip / norms.clamp(min=clip)).nan_to_num(0)
    for p in net.parameters:
        p.grad.mul_(scale.view(-1, *[1] * (p.grad.dim() - 1)))
