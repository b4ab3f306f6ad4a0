"""Section 5: are the solutions of the diagonal linear DEQ dense, and is that the model's doing or its start's?"""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ._flow import F64, Family, problem
from ._judge import beats
from ._result import CONDITIONAL, CONFOUNDED, REPRODUCED, Claim, Result, Table, proved_for_all, spread
from ._run import Choice, Experiment, Part, Run, Tick

MODELS = {"DEQ": -1, "linear": 1, "depth 2": 2, "depth 3": 3}
TARGETS = {"dense": 0, "sparse": 4}
FITTED = 1e-6  # |X beta - y| / |y| of a solution
CONFIG = {
    "samples": Choice(8, "N; fewer than d, so that many solutions fit"),
    "customary": Choice(
        {"DEQ": 1.0, "linear": 1.0, "depth 2": 1e-6, "depth 3": 1e-6},
        "beta0 of each model as it is usually started: w = 0 for the DEQ, u = 1e-3 and 1e-2 for the linear nets",
    ),
    "equal": Choice(1.0, "beta0 of every model, to tell the model from its start"),
    "flows": Choice(3, "problems whose limits are also found by following the flow"),
    "share": Choice(0.5, "of the logarithm of an advantage that must be left at equal start, else it is the start's"),
}


def run_density(run: Run) -> Result:
    """The function of the registry entry."""
    starts = ("customary", "equal")
    keys = [(target, start) for target in TARGETS for start in starts]
    parts = [
        Part(f"{t}/{s}", f"{t} target, {s} initialisation", lambda tick, t=t, s=s: _solve(run, t, s, tick))
        for t, s in keys
    ]
    parts.append(Part("flow", "the same limits by following the flow", lambda tick: _follow(run, tick)))
    values = run.parts(parts)
    rows = {(t, s): {r["model"]: r for r in values[f"{t}/{s}"]} for t, s in keys}
    quick = run.settings.quick
    setting = f"N = {run.config.samples}, d = {run.settings.width}"
    claims = [
        proved_for_all(
            "limit of the flow - minimiser of its potential",
            "Thm. 3",
            values["flow"],
            lambda r: r["difference"],
            "<=",
            1e-6,
        ),
        proved_for_all(
            "solutions interpolate: |X beta - y| / |y|", "Sec. 5", _fits(rows), lambda r: r["fit"], "<=", FITTED
        ),
        *_dense_claims(run, rows, "min/max", "smallest / largest entry, DEQ / depth 2 and 3", True, setting),
        *_dense_claims(run, rows, "error", "distance to a dense target, depth 2 and 3 / DEQ", False, setting),
        beats(
            "distance to a sparse target, depth 2 and 3 / DEQ",
            "Sec. 5",
            rows["sparse", "customary"]["DEQ"],
            _nets(rows["sparse", "customary"]),
            "error",
            quick=quick,
            setting=f"{setting}, 4 entries of 3, customary starts",
        ),
        beats(
            "sparse target: smallest / largest, DEQ / depth 2 and 3",
            "Sec. 5",
            rows["sparse", "equal"]["DEQ"],
            _nets(rows["sparse", "equal"]),
            "min/max",
            quick=quick,
            setting=f"{setting}, 4 entries of 3, all from beta0 = 1",
            conditions="the potential 1 / (2 x^2) repels from 0, at the price of a worse fit to a sparse target",
            larger=True,
        ),
    ]
    tables = [_table(t, s, rows[t, s]) for t, s in keys]
    unmet = max(r["met"].count(False) for of_start in rows.values() for r in of_start.values())
    note = f"Sparse target: {unmet} of {run.settings.seeds} problems are not fitted, as they have no positive solution."
    return Result(claims, tables, values, draw(rows), [note] if unmet else [])


def _nets(rows: dict[str, dict]) -> list[dict]:
    return [rows["depth 2"], rows["depth 3"]]


def _fits(rows: dict) -> list[dict]:
    """The worst of the problems that have a positive solution: without one there is nothing to arrive at."""
    return [
        {
            "case": f"{model}, {target} target, {start} start",
            "fit": max((fit for fit, met in zip(r["fit"], r["met"], strict=True) if met), default=0.0),
        }
        for (target, start), of_start in rows.items()
        for model, r in of_start.items()
    ]


def _dense_claims(run: Run, rows: dict, key: str, statement: str, larger: bool, setting: str) -> list[Claim]:
    """The claim at the customary starts, and what is left of it from one start for all."""
    options = {"larger": larger, "quick": run.settings.quick}
    usual, equal = (
        beats(
            f"{statement}, {start} start",
            "Sec. 5",
            rows["dense", start]["DEQ"],
            _nets(rows["dense", start]),
            key,
            setting=f"{setting}, target in [1/2, 2]",
            **options,
        )
        for start in ("customary", "equal")
    )
    if usual.verdict == REPRODUCED:  # its ratio is above 1, and its logarithm above 0
        kept = math.log(equal.measured) / math.log(usual.measured) if equal.measured > 0 else 0.0
        if kept < run.config.share:
            note = f"{usual.note}; from equal starts {max(kept, 0):.0%} of the log ratio is left: it is the start's"
            usual = Claim(**{**vars(usual), "verdict": CONFOUNDED, "note": note})
    if equal.verdict == REPRODUCED:
        equal = Claim(**{**vars(equal), "verdict": CONDITIONAL})
    return [usual, equal]


def _solve(run: Run, target: str, start: str, tick: Tick) -> list[dict]:
    config, d = run.config, run.settings.width
    rows = [{"model": name, "min/max": [], "participation": [], "error": [], "fit": [], "met": []} for name in MODELS]
    for seed in range(run.settings.seeds):
        X, y, true = problem(config.samples, d, run.settings.seed + seed, min(TARGETS[target], d))
        for row in rows:
            b0 = config.customary[row["model"]] if start == "customary" else config.equal
            beta = Family(MODELS[row["model"]]).limit(X, y, torch.full((d,), b0, dtype=F64))
            size = beta.abs()
            row["min/max"].append(float(size.min() / size.max()))
            row["participation"].append(float(size.sum() ** 2 / (d * size.square().sum())))
            row["error"].append(float((beta - true).norm() / true.norm()))
            row["fit"].append(float((X @ beta - y).norm() / y.norm()))
            row["met"].append(row["fit"][-1] <= FITTED or has_positive_solution(X, true))
            if seed == 0:
                row["shown"] = beta.sort(descending=True).values.tolist()
        tick((seed + 1) / run.settings.seeds)
    return rows


def has_positive_solution(X: Tensor, true: Tensor, most: int = 5000) -> bool:
    """Whether some beta > 0 has X beta = X true, for true >= 0: true + v with an X v = 0 that is positive where true is
    0. Such a v is what the perceptron looks for among so many."""
    rows = torch.linalg.qr(X.mT, mode="complete").Q[true == 0, len(X) :]
    rows = rows / rows.norm(dim=1, keepdim=True)
    v = rows.sum(0)
    for _ in range(most):
        values = rows @ v
        if bool((values > 0).all()):
            return True
        v = v + rows[values.argmin()]
    return False


def _follow(run: Run, tick: Tick) -> list[dict]:
    """From equal starts: the flow of a tiny start takes longer than the limit is worth."""
    rows = []
    for seed in range(min(run.config.flows, run.settings.seeds)):
        X, y, _ = problem(run.config.samples, run.settings.width, run.settings.seed + seed)
        beta0 = torch.full((run.settings.width,), run.config.equal, dtype=F64)
        for name, L in MODELS.items():
            end, best = Family(L).flow(X, y, beta0), Family(L).limit(X, y, beta0)
            case = f"{name}, problem {seed}"
            rows.append({"case": case, "difference": float((end - best).abs().max() / best.abs().max())})
        tick((seed + 1) / run.config.flows)
    return rows


def _table(target: str, start: str, rows: dict[str, dict]) -> Table:
    cells = [
        (name, str(spread(r["min/max"])), str(spread(r["participation"])), str(spread(r["error"])))
        for name, r in rows.items()
    ]
    columns = ("model", "min/max", "participation", "error")
    return Table(f"{target} target, {start} start: median [quartiles] over problems", columns, cells)


def draw(rows: dict) -> Figure:
    """Entries of one limit, largest first: customary and equal starts, dense and sparse target."""
    from . import _plot

    colours = {"DEQ": _plot.BLUE, "linear": _plot.GREY, "depth 2": _plot.ORANGE, "depth 3": _plot.VERMILION}

    @_plot.styled
    def paint() -> Figure:
        panels = [("dense", "customary"), ("dense", "equal"), ("sparse", "equal")]
        fig, axes = _plot.figure(3, (10, 4))
        for ax, (target, start) in zip(axes, panels, strict=True):
            for name, r in rows[target, start].items():
                values = [abs(v) for v in r["shown"]]
                ax.plot(range(1, len(values) + 1), values, "o-", ms=3.5, lw=1, color=colours[name], label=name)
            ax.set_yscale("symlog", linthresh=0.01)
            ax.set_ylim(0, 10)
            ax.set_xlabel("entry of beta, largest first")
            ax.set_title(f"{target} target, {start} start")
        axes[0].set_ylabel("|beta|")
        axes[0].legend(frameon=False, loc="lower left")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="density",
    title="Section 5: dense or sparse solutions",
    claim=(
        "The diagonal linear DEQ learns dense solutions where diagonal linear nets of depth 2 and 3 learn sparse ones, "
        "and so fits dense targets better."
    ),
    function=run_density,
    width_means="dimension d, more than the samples",
    holds=lambda width, seeds: 8 * width**2,  # a basis of what the samples do not see
    width=(20, 20, 1000),
    seeds=(16, 8, 64),
    smallest_width=16,  # twice the samples: with fewer, positive solutions hardly differ, or there is none
    config=CONFIG,
)
