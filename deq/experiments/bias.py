"""Theorem 3: where gradient flow takes a diagonal linear DEQ, the sign of its potential, and how fast it gets there."""

import math
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import weights
from ..solve import solve
from ._flow import F64, Family, off_row_space, problem
from ._result import Claim, Result, Table, number, proved, proved_for_all
from ._run import Choice, Experiment, Part, Run, Tick

DEQ = Family(-1)
MEMBERS = (-2, -1, 1, 2, 3)  # L of beta = u^L; -1 is the DEQ
SIZES = ((3, 8), (5, 20), (8, 20), (10, 40))  # (N, d) of the small problems
PATH = 2000  # steps of a flow that the basin's bounds are checked on; X of nearly dependent rows would take 10^5
CONFIG = {
    "samples": Choice(4, "N of the wide problems: N <= d, so that X has full row rank and every label can be fitted"),
    "rates": Choice(
        (0.05, 0.02, 0.01, 0.005),
        "of gradient descent; 0.2 leaves w < 1, and where one does all are halved",
        quick=(0.05, 0.02),
    ),
    "basins": Choice(200, "random problems for the basin of linear convergence", quick=30, full=2000),
    "tolerance": Choice(1e-7, "between flow and minimiser, relative: a hundred times the integrator's own error"),
}


def run_bias(run: Run) -> Result:
    """The function of the registry entry."""
    config, width = run.config, run.settings.width
    wide = [10**k for k in range(3, 1 + int(math.log10(width))) if 10**k < width] + [width]
    small = {d for _, d in SIZES}
    sizes = [*((N, d) for N, d in SIZES if d <= width), *((config.samples, d) for d in wide if d not in small)]
    parts = [
        Part(f"flow/{d}/{N}", f"flow against minimiser, N = {N}, d = {d}", _flowing(run, N, d), N * d) for N, d in sizes
    ]
    parts += [
        Part("family", "members L = -2 to 3 of the diagonal family", lambda tick: _members(run)),
        Part("signs", "negative entries, and the minus sign", lambda tick: _signs(run)),
        Part("engine", "gradients by deq.solve", lambda tick: _engine(run)),
        Part("descent", "gradient descent at several rates", _descending(run)),
        Part("basin", "basin of linear convergence", _basins(run)),
    ]
    values = run.parts(parts)
    flows = [values[f"flow/{d}/{N}"] for N, d in sizes]
    claims = _claims(flows, values, config.tolerance)
    tables = [_flow_table(flows), _member_table(values["family"])]
    notes = [
        "q of the diagonal family beta = u^L: q' = (beta0^-e - beta^-e) / e, e = 1 - 2 / L. The DEQ is L = -1, e = 3.",
        "Minus sign, as one printed form has it: for X = (1, -1), y = 0 it is 1 / s^2 - 2 s at beta = (s, s), "
        "unbounded below.",
    ]
    return Result(claims, tables, values, draw(flows, values), notes)


def _flowing(run: Run, N: int, d: int) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        X, y, _ = (v.to(run.device) for v in problem(N, d, run.settings.seed))
        beta0 = 0.7 + 0.6 * torch.rand(d, dtype=F64, generator=torch.Generator().manual_seed(run.settings.seed + 9))
        beta0 = beta0.to(run.device)
        steps = []
        end = DEQ.flow(X, y, beta0, visit=lambda t, beta: steps.append(t))
        tick(0.8)
        best = DEQ.minimiser(X, y, beta0)
        return {
            "case": f"N = {N}, d = {d}",
            "N": N,
            "d": d,
            "steps": len(steps),
            "fit": float((X @ end - y).norm() / y.norm()),
            "difference": float(((end - best) / best).abs().max()),
            "plus": off_row_space(X, DEQ.gradient(end, beta0)),
            "minus": off_row_space(X, DEQ.gradient(end, beta0, -1.0)),
            "shown": torch.stack((end[:40], best[:40]), 1).tolist(),
        }

    return compute


def _members(run: Run) -> list[dict]:
    rows = []
    X, y, _ = problem(5, 20, run.settings.seed)
    for L in MEMBERS:
        family, beta0 = Family(L), torch.ones(20, dtype=F64)
        end, best = family.flow(X, y, beta0), family.minimiser(X, y, beta0)
        difference = float(((end - best) / best).abs().max())
        rows.append(
            {
                "L": L,
                "case": f"L = {L}",
                "difference": difference,
                "stationary": off_row_space(X, family.gradient(end, beta0)),
                "min/max": float(end.min() / end.max()),
            }
        )
    return rows


def _signs(run: Run) -> dict:
    """Negative entries: the last layer is -1, so beta = -1 / (1 - w) < 0 follows the same flow."""
    negative = Family(-1, sign=-1.0)
    X, y, _ = problem(3, 8, run.settings.seed)
    beta0 = -torch.ones(8, dtype=F64)
    end = negative.flow(X, -y, beta0)
    best = negative.minimiser(X, -y, beta0)
    return {
        "difference": float(((end - best) / best).abs().max()),
        "largest": float(end.max()),
        "plus": off_row_space(X, negative.gradient(end, beta0)),
        "minus": off_row_space(X, negative.gradient(end, beta0, -1.0)),
    }


def _engine(run: Run) -> dict:
    """dL/dw of the DEQ z = w z + x, f = sum z, by the engine's implicit gradient against (X^T r) beta^2."""
    X, y, _ = (v.to(run.device) for v in problem(5, 20, run.settings.seed))
    w = (torch.rand(20, dtype=F64, generator=run.generator("engine"), device=run.device) - 0.5).requires_grad_()
    z = solve(weights.Diagonal(w), X, "identity").z
    r = z.sum(1) - y
    (gradient,) = torch.autograd.grad(0.5 * r.square().sum(), w)
    exact = (X.mT @ (X @ (1 / (1 - w)) - y)) / (1 - w) ** 2
    return {"difference": float(((gradient - exact) / exact).detach().abs().max())}


def _descending(run: Run) -> Callable[[Tick], dict]:
    """Gradient descent on w from beta0 = 1: distance to the flow's limit by rate, and the gradient inequality
    |dL/dw|^2 >= 2 mu_min beta_min^4 L, with mu_min the smallest eigenvalue of X X^T, at every step."""

    def compute(tick: Tick) -> dict:
        X, y, _ = problem(5, 20, run.settings.seed + 2)
        limit = DEQ.flow(X, y, torch.ones(20, dtype=F64))
        mu = float(torch.linalg.eigvalsh(X @ X.mT)[0])
        rates = run.config.rates
        while None in (descents := [_descend(X, y, mu, rate) for rate in rates]):
            rates = [rate / 2 for rate in rates]
        rows = [
            {"rate": rate, "distance": float((beta - limit).abs().max())}
            for rate, (beta, _, _) in zip(rates, descents, strict=True)
        ]
        violations, steps = (sum(descent[i] for descent in descents) for i in (1, 2))
        (a, b) = (rows[0], rows[-1])
        order = math.log(a["distance"] / b["distance"]) / math.log(a["rate"] / b["rate"])
        return {"rows": rows, "order": order, "violations": violations, "steps": steps}

    return compute


def _descend(X: Tensor, y: Tensor, mu: float, rate: float) -> tuple[Tensor, int, int] | None:
    """beta where gradient descent on w from beta = 1 arrives, the number of steps that break the gradient inequality,
    and of all; None if the rate is so large that a step leaves w < 1, outside of which there is no such flow."""
    w, violations, steps = torch.zeros(X.shape[1], dtype=F64), 0, 0
    while bool((w < 1).all()):
        beta = 1 / (1 - w)
        r = X @ beta - y
        loss, gradient = float(r @ r) / 2, (X.mT @ r) * beta**2
        violations += float(gradient @ gradient) < 2 * mu * float(beta.min()) ** 4 * loss * (1 - 1e-9)
        steps += 1
        if loss < 1e-22:
            return beta, violations, steps
        w = w - rate * gradient
    return None


def _basins(run: Run) -> Callable[[Tick], dict]:
    """From |X beta0 - y| = 7/384 mu_min beta0 / max |column|: does beta stay in [beta0/2, 2 beta0], and does the
    residual fall as exp(-mu_min (beta0/2)^4 t)?"""

    def compute(tick: Tick) -> dict:
        g, left, slow = run.generator("basin", "cpu"), 0, 0  # thousands of steps of a few numbers each
        for k in range(run.config.basins):
            N, d = int(torch.randint(1, 6, (), generator=g)), int(torch.randint(6, 15, (), generator=g))
            X = torch.randn(N, d, dtype=F64, generator=g)
            b0 = 0.3 + 2.7 * float(torch.rand((), dtype=F64, generator=g))
            mu = float(torch.linalg.eigvalsh(X @ X.mT)[0])
            radius = 7 / 384 * mu * b0 / float(X.norm(dim=0).max())
            direction = torch.randn(N, dtype=F64, generator=g)
            y = X @ torch.full((d,), b0, dtype=F64) - direction * (radius / float(direction.norm()))
            seen: list[tuple[float, Tensor]] = []
            DEQ.flow(
                X,
                y,
                torch.full((d,), b0, dtype=F64),
                rtol=1e-9,
                tol=1e-5 * radius / float(y.norm()),
                visit=lambda t, beta, seen=seen: seen.append((t, beta)),
                enough=lambda seen=seen: len(seen) >= PATH,
            )
            t = torch.tensor([s[0] for s in seen], dtype=F64)
            path = torch.stack([s[1] for s in seen])
            residual = (path @ X.mT - y).norm(dim=1)
            left += bool((path.min() < b0 / 2) | (path.max() > 2 * b0))
            bound = radius * torch.exp(-mu * (b0 / 2) ** 4 * t) * (1 + 1e-6) + 1e-9 * float(y.norm())
            slow += bool((residual > bound).any())
            tick((k + 1) / run.config.basins)
        return {"problems": run.config.basins, "left": left, "slow": slow}

    return compute


# --- verdicts --------------------------------------------------------------------------------------------------------


def _claims(flows: list[dict], values: dict, tolerance: float) -> list[Claim]:
    members, signs, descent, basin = (values[k] for k in ("family", "signs", "descent", "basin"))
    source = "Thm. 3"
    engine = values["engine"]["difference"]
    n = basin["problems"]
    return [
        proved_for_all(
            "flow - minimiser of Q with the plus sign, relative",
            source,
            flows,
            lambda r: r["difference"],
            "<=",
            tolerance,
        ),
        proved_for_all("Q' at the limit off the rows of X, plus sign", source, flows, lambda r: r["plus"], "<=", 1e-8),
        proved_for_all("the same with the minus sign", source, flows, lambda r: r["minus"], ">=", 0.1),
        proved("negative entries: flow - minimiser, plus sign", source, signs["difference"], "<=", tolerance),
        proved("negative entries: largest entry of the limit", source, signs["largest"], "<", 0),
        proved("negative entries: Q' off the rows, minus sign", source, signs["minus"], ">=", 0.1),
        proved_for_all(
            "diagonal family: flow - minimiser of its q", source, members, lambda r: r["difference"], "<=", tolerance
        ),
        proved("dL/dw by deq.solve - closed form, relative", source, engine, "<=", 1e-9),
        proved("gradient descent: order of |GD - flow| in its rate", "Sec. 5", descent["order"], ">=", 0.8),
        proved(
            "steps with |dL/dw|^2 < 2 mu_min beta_min^4 L",
            "Sec. 5",
            descent["violations"],
            "==",
            0,
            f"{descent['steps']} steps",
        ),
        proved("basin: problems whose beta leaves [1/2, 2] beta0", "Sec. 5", basin["left"], "==", 0, f"of {n}"),
        proved("basin: problems slower than exp(-mu (beta0/2)^4 t)", "Sec. 5", basin["slow"], "==", 0, f"of {n}"),
    ]


def _flow_table(flows: list[dict]) -> Table:
    rows = [
        (str(r["N"]), str(r["d"]), str(r["steps"]), *(number(r[k]) for k in ("fit", "difference", "plus", "minus")))
        for r in flows
    ]
    columns = ("N", "d", "steps", "|Xb-y|/|y|", "flow-argmin", "off rows +", "off rows -")
    return Table("Gradient flow of the diagonal linear DEQ and the minimiser of Q", columns, rows)


def _member_table(members: list[dict]) -> Table:
    rows = [
        (
            ("DEQ, " if r["L"] == -1 else "") + f"L = {r['L']}",
            *(number(r[k]) for k in ("difference", "stationary", "min/max")),
        )
        for r in members
    ]
    return Table(
        "The diagonal family beta = u^L from beta0 = 1", ("member", "flow-argmin", "off rows", "min/max"), rows
    )


def draw(flows: list[dict], values: dict) -> Figure:
    """Flow against minimiser, both signs of Q, and the order of gradient descent."""
    from . import _plot

    @_plot.styled
    def paint() -> Figure:
        fig, (match, sign, order) = _plot.figure(3, (10, 4))
        for r, colour in zip(flows, (_plot.BLUE, _plot.SKY, _plot.GREEN, _plot.ORANGE) * 4, strict=False):
            points = np.array(r["shown"])
            match.plot(points[:, 1], points[:, 0], "o", ms=4, mew=0, color=colour, alpha=0.7)
        low, high = match.get_xlim()
        match.plot([low, high], [low, high], color=_plot.GREY, lw=0.8, zorder=0)
        match.set_xlabel("entry of the minimiser of Q")
        match.set_ylabel("entry of the flow's limit")
        match.set_title("Flow = minimiser")
        x = np.geomspace(0.25, 4, 200)
        for s, colour, name in (
            (1, _plot.BLUE, "plus: minimum at $\\beta_0$"),
            (-1, _plot.VERMILION, "minus: no minimum"),
        ):
            sign.plot(x, 0.5 / x**2 + s * x, color=colour)
            sign.annotate(
                name,
                (x[-1], 0.5 / x[-1] ** 2 + s * x[-1]),
                (-4, 8 * s),
                textcoords="offset points",
                ha="right",
                va="bottom" if s > 0 else "top",
                color=colour,
            )
        sign.set_ylim(-6, 7)
        sign.set_xlabel("$x$")
        sign.set_ylabel("$1/(2x^2) \\pm \\beta_0^{-3} x$, $\\beta_0 = 1$")
        sign.set_title("The sign in Theorem 3")
        rows = values["descent"]["rows"]
        eta = np.array([r["rate"] for r in rows])
        gap = np.array([r["distance"] for r in rows])
        order.loglog(eta, gap, "o-", color=_plot.BLUE)
        order.loglog(eta, gap[-1] * eta / eta[-1], "--", color=_plot.GREY, lw=1)
        order.text(0.05, 0.93, "dashed: proportional to the rate", color=_plot.GREY, transform=order.transAxes)
        _plot.sparse_ticks(order.xaxis)
        _plot.sparse_ticks(order.yaxis)
        order.set_xlabel("rate of gradient descent")
        order.set_ylabel("sup distance to the flow's limit")
        order.set_title("Descent follows the flow")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="bias",
    title="Theorem 3: implicit bias of the diagonal linear DEQ",
    claim=(
        "Gradient flow of f(x) = 1^T z, z = diag(w) z + x, beta = 1 / (1 - w), converges to the interpolating beta > 0 "
        "that minimises the sum of 1 / (2 beta_i^2) + beta_i(0)^-3 beta_i."
    ),
    function=run_bias,
    width_means="largest dimension d",
    holds=lambda width, seeds: 14 * 8 * width,  # X of four samples, and the stages of a step of the flow
    width=(10**6, 1000, 10**7),
    smallest_width=SIZES[0][1],
    config=CONFIG,
)
