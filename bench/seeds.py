"""Many seeds at once: the trainer of the experiments against a torch loop, seed after seed, with the same losses."""

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deq.experiments._dense_nets import ROW_SUM, DenseDEQ
from deq.experiments._train import train

F32 = torch.float32
TOL, MAX_ITER, RATE = 1e-5, 500, 1e-2
BATCHES = 64, 512
MUST = 8.0  # times as fast as the loop, whose operators are too small for a second thread


@dataclass(frozen=True)
class Case:
    """seeds, width, batch, and Adam steps of a training run. Solves start from the last equilibrium, in
    both."""

    seeds: int = 16
    width: int = 20
    batch: int = 512
    steps: int = 20


def problem(case: Case) -> tuple[Tensor, Tensor]:
    """x (S, B, 1) and a smooth target (S, B)."""
    x = ((torch.arange(case.batch, dtype=F32) + 0.5) / case.batch).view(1, -1, 1).expand(case.seeds, -1, -1)
    return x, torch.sin(7 * x[..., 0]) + 0.3 * torch.sin(25 * x[..., 0])


def make_net(case: Case) -> DenseDEQ:
    return DenseDEQ(case.seeds, 1, case.width, torch.Generator().manual_seed(0), "contractive", F32, 4.0, warm=True)


def train_together(case: Case) -> Tensor:
    """Losses (S,) after training all seeds in one go."""
    net, (x, y) = make_net(case), problem(case)
    train(net, lambda: (x, y), steps=case.steps, rate=RATE)
    with torch.no_grad():
        return (net(x) - y).square().mean(1)


class _Loop(torch.autograd.Function):
    """Equilibrium and implicit gradient as a careful user writes them: fused steps, residuals sample by sample."""

    @staticmethod
    def forward(ctx, W, c, z0):
        z = _iterate(lambda z: torch.relu_(torch.addmm(c, z, W.mT)), z0)
        ctx.save_for_backward(W, z)
        return z

    @staticmethod
    def backward(ctx, g):
        W, z = ctx.saved_tensors
        d = (z > 0).to(z.dtype)
        u = _iterate(lambda u: torch.addmm(g, u, W).mul_(d), torch.zeros_like(g))
        return u.mT @ z, u, None


def _iterate(f, z: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm
    for _ in range(MAX_ITER):
        new = f(z)
        done = (norm(new - z, dim=1) <= TOL * norm(new, dim=1)).all().item()
        z = new
        if done:
            break
    return z


def train_one_by_one(case: Case) -> Tensor:
    """The same losses (S,) by plain PyTorch, one seed after the other."""
    start, (xs, ys) = make_net(case), problem(case)
    losses = []
    for seed in range(case.seeds):
        V, U, b, a, y0 = (
            p[seed].detach().clone().requires_grad_() for p in (start.V, start.U, start.b, start.a, start.y0)
        )
        optimiser = torch.optim.Adam((V, U, b, a, y0), lr=RATE)
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: 0.02 + 0.98 * (1 + math.cos(math.pi * step / case.steps)) / 2
        )
        x, y = xs[seed], ys[seed]
        z = torch.zeros(case.batch, case.width)

        def output(z0: Tensor, x=x, V=V, U=U, b=b, a=a, y0=y0) -> tuple[Tensor, Tensor]:
            W = V * (ROW_SUM / V.abs().sum(1, keepdim=True)).clamp(max=1)
            z = _Loop.apply(W, torch.addmm(b, x, U), z0)
            return torch.addmm(y0, z, a).squeeze(1), z.detach()

        for _ in range(case.steps):
            optimiser.zero_grad()
            out, last = output(z)
            (out - y).square().mean().backward()
            optimiser.step()
            decay.step()
            z = last
        with torch.no_grad():
            losses.append((output(z)[0] - y).square().mean())
    return torch.stack(losses)


def measure(case: Case, threads: int, rounds: int = 5) -> dict:
    """Median seconds of both, in turns, their ratio, and how far their losses differ, relative to the mean loss."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together, alone = train_together(case), train_one_by_one(case)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for times, run in zip(seconds, (train_together, train_one_by_one), strict=True):
                began = time.perf_counter()
                run(case)
                times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    ours, theirs = map(statistics.median, seconds)
    return {
        "case": f"seeds{case.seeds}-m{case.width}-B{case.batch}-{threads} threads",
        "variant": "all seeds at once",
        "threads": threads,
        "seconds": ours / case.steps,
        "loop_seconds": theirs / case.steps,
        "ratio": theirs / ours,
        "must": MUST,
        "reached": theirs / ours >= MUST,
        "difference": float(((together - alone).abs() / alone.mean()).max()),
    }
