"""Training on the steep target: exact-equilibrium DEQs beside feed-forward nets of at least as many parameters."""

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from ._equilibria import difference_over_bound, solve_twice
from ._nets import DiagonalDEQ, EquilibriumNet, FeedForward, SeededNet, TriangularDEQ, matching_width
from ._result import spread
from ._run import Run, Tick
from ._steep_target import F64, binding_point, target
from ._train import train

DEPTHS = (2, 3, 4)  # weight matrices of the feed-forward nets
BATCH = 256
TESTS = 4096
Make = Callable[[int, torch.Generator], SeededNet]


def models(width: int, d: int) -> dict[str, Make]:
    """Constructors (seeds, generator) -> net by name; the names say width and, for feed-forward nets, depth."""
    found: dict[str, Make] = {
        f"diagonal DEQ {width}": lambda S, g: DiagonalDEQ(S, d, width, g),
        f"triangular DEQ {width}": lambda S, g: TriangularDEQ(S, d, width, g),
    }
    parameters = (
        width * (d + 2) + 1 + max(width, width * (width - 1) // 2)
    )  # of the larger DEQ, from width 3 the second
    for depth in DEPTHS:
        n = matching_width(d, depth, parameters)
        found[f"feed-forward {n}x{depth}"] = lambda S, g, n=n, depth=depth: FeedForward(S, d, n, depth, g)
    return found


def sample(seeds: int, count: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (seeds, count, d) and g(x): t = 1 - x_1 log-uniform in [delta/8, 1], but uniform for an eighth of the points
    and 0 for a quarter of those; other coordinates uniform. Uniform t alone almost never meets the rise."""
    delta = 2.0**-d

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=F64, device=generator.device, generator=generator)

    t = torch.exp(uniform(seeds, count) * math.log(8 / delta)) * (delta / 8)
    eighth = count // 8
    t[:, :eighth] = uniform(seeds, eighth)
    t[:, : eighth // 4] = 0
    x = uniform(seeds, count, d)
    x[:, :, 0] = 1 - t
    return x, target(t, delta)


def train_one(run: Run, d: int, make: Make, steps: int, tick: Tick) -> dict:
    """Train one model for all seeds: errors of every seed at the end and along the way; evidence if it is a DEQ.

    norms: product of the infinity norms of the weight matrices, which bounds a feed-forward net's Lipschitz constant.
    For a DEQ it is ||U|| ||a|| max(1, ||W||), a size and no bound. sup: largest error over the test points and, for
    a feed-forward net, over the pair of inputs at which its own norms force the error of :func:`floor`.
    """
    S, delta = run.settings.seeds, 2.0**-d
    net = make(S, run.generator(f"init/{d}"))
    data = run.generator(f"data/{d}")
    x, y = sample(1, TESTS, d, run.generator(f"test/{d}"))
    x = x.expand(S, -1, -1)
    history: list[dict] = []

    def observe(step: int) -> None:
        error = (net(x) - y).abs()
        norms, sup = _norm_product(net), error.amax(1)
        if not isinstance(net, EquilibriumNet):
            sup = torch.maximum(sup, _error_where_forced(net, x[:, :1], norms, delta))
        mse = error.square().mean(1)
        history.append({"step": step, "norms": norms.tolist(), "sup": sup.tolist(), "mse": mse.tolist()})
        tick(step / steps)

    early = (round(steps ** (i / 10)) for i in range(11))
    checkpoints = {0, *early, *range(0, steps + 1, max(1, steps // 10))}
    log = train(net, lambda: sample(S, BATCH, d, data), steps=steps, checkpoints=checkpoints, observe=observe)
    last = {key: history[-1][key] for key in ("mse", "sup", "norms")}
    summary = {key: asdict(spread(values)) for key, values in last.items()}
    row = {
        "d": d,
        "parameters": net.count,
        **last,
        "summary": summary,
        "overflowed": log.overflowed,
        "history": history,
    }
    if isinstance(net, EquilibriumNet):
        with torch.no_grad():
            row["equilibrium"] = _evidence(net, x[:, ::16], y[:, ::16])
    return row


def _norm_product(net: SeededNet) -> Tensor:
    norms = net.norms()
    if isinstance(net, EquilibriumNet):  # W comes first; below 1 it makes nothing smaller
        norms = torch.cat((norms[:, :1].clamp(min=1), norms[:, 1:]), 1)
    return norms.prod(1)


def _error_where_forced(net: SeededNet, x: Tensor, norms: Tensor, delta: float) -> Tensor:
    """(S,) the larger error of x (S, 1, d) moved to x_1 = 1 and to the point where the floor of ``norms`` binds."""
    pair = x.repeat(1, 2, 1)
    pair[:, 0, 0] = 1
    pair[:, 1, 0] = 1 - torch.tensor([binding_point(v, delta) for v in norms.tolist()], dtype=F64, device=x.device)
    return (net(pair) - target(1 - pair[..., 0], delta)).abs().amax(1)


def _evidence(net: EquilibriumNet, x: Tensor, y: Tensor) -> dict:
    """The final nets solved from zero by the engine, against the closed form and against what training used."""
    W, c = net.weight(), net.injection(x)

    def metric(z: Tensor) -> float:
        return float((net.readout(z) - y).square().mean(1).median())

    row, z = solve_twice(W, c, metric)
    return row | {
        "metric_used": metric(net.equilibrium(c)),
        "difference": difference_over_bound(W, c, z, net.closed_form(c)),
    }
