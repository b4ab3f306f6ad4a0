"""The models that a function of one variable is fitted with: equilibria, the cut-off iteration, feed-forward nets."""

from collections.abc import Callable

import torch

from ._dense_nets import PARAMETRISATIONS, DenseDEQ, TiedNet
from ._fit import Make
from ._judge import beats
from ._nets import FeedForward, TriangularDEQ, feedforward_count, matching_width, smallest
from ._result import Claim

F32 = torch.float32
FINITE = "a net of finite depth, no equilibrium"  # the condition of every claim about the cut-off iteration
TIED_STEPS = 10  # what a solver that stops after ten evaluations computes


def equilibria(width: int, kinks: float, warm: bool = True) -> dict[str, Make]:
    """True equilibria of this width: triangular, contractive, monotone and free weights."""
    made: dict[str, Make] = {
        f"triangular DEQ {width}": lambda S, g: TriangularDEQ(S, 1, width, g, dtype=F32, kinks=kinks)
    }
    for kind in PARAMETRISATIONS:
        made[f"{kind} DEQ {width}"] = lambda S, g, kind=kind: DenseDEQ(S, 1, width, g, kind, F32, kinks, warm=warm)
    return made


def tied(width: int, kinks: float, steps: int = TIED_STEPS) -> dict[str, Make]:
    """The plain iteration of this width, cut off."""
    return {f"tied {width}, K = {steps}": lambda S, g: TiedNet(S, 1, width, g, steps, F32, kinks)}


def feedforward(width: int, depth: int, kinks: float, steps: int = TIED_STEPS) -> dict[str, Make]:
    """Feed-forward nets with a DEQ's parameters (at this depth), the FLOPs of its cut-off iteration (two layers
    deeper), and the memory of its backward pass (as many hidden units as the DEQ has neurons)."""
    parameters = width * width + 3 * width + 1
    same = {
        "params": (matching_width(1, depth, parameters), depth),
        "FLOPs": (width_for_flops(depth + 2, 2 * (2 * width + (steps - 1) * width * width)), depth + 2),
        "memory": (-(-width // (depth - 1)), depth),
    }
    return {
        f"feed-forward {n}x{d} ({what})": lambda S, g, n=n, d=d: FeedForward(S, 1, n, d, g, F32, kinks)
        for what, (n, d) in same.items()
    }


def width_for_flops(depth: int, flops: float) -> int:
    """The smallest width with at least so many; a net's parameters less its biases are half of its FLOPs."""
    return smallest(lambda width: 2 * (feedforward_count(1, width, depth) - width * (depth - 1) - 1) >= flops)


def judge(
    rows: list[dict], statement: Callable[[str, str], str], source: str, key: str = "mse", *, quick: bool, setting: str
) -> list[Claim]:
    """Every DEQ of the lineup against the feed-forward net of equal parameters, and the cut-off iteration, which is no
    equilibrium, against that of equal FLOPs too. statement(what is equal, model): the sentence of a claim."""
    rivals = {
        what: next(r for r in rows if f"({what})" in r["model"]) for what in ("params", "FLOPs") if _has(rows, what)
    }
    claims = []
    for r in rows:
        finite = r["model"].startswith("tied")
        for what, rival in rivals.items():
            if r["evidence"] is None or (what == "FLOPs" and not finite):
                continue
            claims.append(
                beats(
                    statement(what, r["model"]),
                    source,
                    r,
                    [rival],
                    key,
                    quick=quick,
                    setting=setting,
                    conditions=FINITE if finite else "",
                    about_equilibria=not finite,
                )
            )
    return claims


def _has(rows: list[dict], what: str) -> bool:
    return any(f"({what})" in r["model"] for r in rows)
