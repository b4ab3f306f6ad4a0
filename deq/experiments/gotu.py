"""Generalisation on the unseen: closed forms for linear Boolean functions, and nets trained on nonlinear ones."""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ._attempts import WIDER, Attempt, attempt_claims, attempt_table, attempts
from ._boolean import F32, TASKS, cube, models, seen_part, train_on_seen, training_parts
from ._dense_nets import DenseDEQ
from ._fit import FIT_COLUMNS, fit_table_rows
from ._flow import F64, Family, integrate
from ._judge import beats
from ._result import (
    CONDITIONAL,
    CONFOUNDED,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    Result,
    Table,
    number,
    proved,
    proved_for_all,
    spread,
)
from ._run import TRAINED, Choice, Experiment, Part, Run, Tick

MEMBERS = {"DEQ": -1, "depth 2": 2, "depth 3": 3}
LINEAR = (
    (0.0, 1.0),
    (0.0, 1.5),
    (0.0, 2.0),
    (0.0, 3.0),
    (0.5, 1.0),
    (1.0, 1.0),
    (0.0, 0.5),
    (-1.0, 1.0),
)  # f^({}), c_k
TRIED = "f2"  # the task on which other ways of training are tried
BALLS = (1, 2, 3, 5)  # largest numbers of -1 in the stages of the curriculum
CONFIG = {
    "dimension": Choice(10, "of the cube for trained nets: 2^10 points, all of them in every batch", quick=6, full=14),
    "linear_dimension": Choice(8, "of the cube for the linear closed forms; other modes decouple", quick=5),
    "customary": Choice({"DEQ": 1.0, "depth 2": 1e-3, "depth 3": 1e-3}, "beta0 of w = 0, u = 0.03 and u = 0.1"),
    "equal": Choice((1.0, 0.1), "beta0 of every model, to tell the model from its start", quick=(1.0,)),
    "steps": Choice(1500, "every net has fitted the seen part to 1e-4 by then", quick=30, full=5000),
    "rate": Choice(3e-3, "Adam; the largest at which no seed of any model fails to fit the seen part"),
    "clip": Choice(5.0, "2-norm of a seed's gradient"),
}


def run_gotu(run: Run) -> Result:
    """The function of the registry entry."""
    config, width = run.config, run.settings.width
    linear = Part("linear", "closed forms and flows on linear functions", lambda tick: _linear(run, tick))
    parts = training_parts(run, TASKS)
    tried = _attempts(run)
    tries = [_part(run, name, attempt) for name, attempt in tried.items()]
    values = run.parts([linear, *(part for of_task in parts.values() for part in of_task), *tries])
    linear = values["linear"]
    trained = {t: [values[part.key] for part in of_task] for t, of_task in parts.items()}
    claims = [*_linear_claims(linear), *_start_claims(linear)]
    for t, rows in trained.items():
        setting = f"{TASKS[t].formula}; d = {config.dimension}, width {width}, {config.steps} steps"
        for deq in rows[:2]:
            statement = f"{t}: unseen error, feed-forward / {deq['model']}"
            claims.append(beats(statement, "Fig. 1c,f", deq, rows[2:], quick=run.settings.quick, setting=setting))
    more, usual = {name: values[f"tried/{name}"] for name in tried}, {r["model"]: r for r in trained[TRIED]}
    claims += attempt_claims(
        tried,
        usual | more,
        lambda model: f"{TRIED}: unseen error, feed-forward / {model}",
        "Fig. 1c,f",
        quick=run.settings.quick,
        setting=f"{TASKS[TRIED].formula}; d = {config.dimension}, {config.steps} steps",
    )
    notes = [
        "Linear f = f0 + sum c_i x_i, seen x_k = 1, model 1^T z + b: b - q'(beta_k) / L^2 is conserved, so beta_k is "
        "the root of beta + b0 + q'(beta) / L^2 = f0 + c_k.",
        "Curriculum: points with at most 1, 2, 3, 5 coordinates of -1, as in Abbe et al. 2023.",
        *(note for rows in (*trained.values(), more.values()) for r in rows for note in r["notes"]),
    ]
    tables = [
        _linear_table(linear),
        *(_trained_table(t, rows) for t, rows in trained.items()),
        attempt_table(f"{TRIED}: unseen error", tried, usual | more, usual["vanilla DEQ"]),
    ]
    return Result(claims, tables, values, draw(linear, trained), notes)


def _attempts(run: Run) -> dict[str, Attempt]:
    """Other ways to train a DEQ on one task."""
    d, width, task = run.config.dimension, run.settings.width, TASKS[TRIED]
    easier = [seen_part(run, task, d, most) for most in BALLS if most < d]
    rival = list(models(width, d).items())[-1]
    monotone = Attempt(lambda S, g: DenseDEQ(S, d, width, g, "monotone", F32, warm=True), against=(rival[0],))
    return attempts(run, d, None, seen_part(run, task, d), easier, rival) | {f"monotone DEQ {width}": monotone}


def _part(run: Run, name: str, attempt: Attempt) -> Part:
    d, config = run.config.dimension, run.config

    def compute(tick: Tick) -> dict:
        return train_on_seen(
            run,
            TASKS[TRIED],
            d,
            name,
            attempt.make,
            tick,
            steps=config.steps * attempt.longer,
            rate=config.rate,
            prepare=attempt.prepare,
        )

    return Part(f"tried/{name}", f"train {name} on {TRIED}", compute, run.settings.seeds * 2**d * run.settings.width)


def root(family: Family, total: float, beta0: float, b0: float = 0.0) -> float:
    """beta_k of the limit: the root of beta + b0 + q'(beta) / L^2 = total, increasing in beta, by bisection of log
    beta."""

    def value(log_beta: float) -> float:
        beta = torch.tensor(math.exp(log_beta), dtype=F64)
        return float(beta + b0 + family.gradient(beta, torch.tensor(beta0, dtype=F64)) / family.L**2) - total

    low, high = -60.0, 20.0
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def _linear(run: Run, tick: Tick) -> list[dict]:
    config = run.config
    starts = [("customary", config.customary)] + [(f"beta0 = {b}", dict.fromkeys(MEMBERS, b)) for b in config.equal]
    rows = []
    for i, (f0, ck) in enumerate(LINEAR):
        for start, beta0 in starts:
            for name, L in MEMBERS.items():
                rows.append(_flow_on_seen(config.linear_dimension, Family(L), f0, ck, beta0[name]))
                rows[-1] |= {"model": name, "start": start, "case": f"{name}, {start}, f0 = {f0}, c_k = {ck}"}
        tick((i + 1) / len(LINEAR))
    return rows


def _flow_on_seen(d: int, family: Family, f0: float, ck: float, b0: float) -> dict:
    """Gradient flow on the mean loss over all seen points, of u and of the bias, against the closed forms."""
    x = cube(d).double()
    c = torch.full((d,), 1.2, dtype=F64)
    c[0] = ck
    y, seen = x @ c + f0, x[:, 0] > 0
    X, target = x[seen], y[seen]

    def residual(u: Tensor) -> Tensor:
        return X @ family.beta(u[:-1]) + u[-1] - target

    def slope(u: Tensor) -> Tensor:
        r = residual(u) / len(X)
        return -torch.cat((X.mT @ r * family.L * u[:-1] ** (family.L - 1), r.sum()[None]))

    start = torch.cat((family.start(torch.full((d,), b0, dtype=F64)), torch.zeros(1, dtype=F64)))
    u, _ = integrate(slope, start, done=lambda u: float(residual(u).norm()) <= 1e-8 * float(target.norm()))
    beta, b = family.beta(u[:-1]), float(u[-1])
    gotu = float((x @ beta + b - y)[~seen].square().mean())
    closed = root(family, f0 + ck, b0)
    conserved = b - float(family.gradient(beta[:1], torch.full((1,), b0, dtype=F64))) / family.L**2
    size = max(1.0, 4 * ck * ck)
    return {
        "f0": f0,
        "ck": ck,
        "beta0": b0,
        "gotu": gotu,
        "lowest": 4 * ck * ck,
        "by_weight": abs(gotu - 4 * (ck - float(beta[0])) ** 2) / size,
        "by_bias": abs(gotu - 4 * (b - f0) ** 2) / size,
        "conserved": abs(conserved),
        "root": abs(float(beta[0]) - closed) / closed,
        "bias": b,
        "bias_bound": b0**-3 / 3,
    }


# --- verdicts --------------------------------------------------------------------------------------------------------


def _linear_claims(rows: list[dict]) -> list[Claim]:
    deq = [r for r in rows if r["model"] == "DEQ"]
    source = "Eq. 13"
    return [
        proved_for_all(
            "unseen error - 4 (c_k - beta_k)^2, relative", source, rows, lambda r: r["by_weight"], "<=", 1e-6
        ),
        proved_for_all("unseen error - 4 (b - f0)^2, relative", source, rows, lambda r: r["by_bias"], "<=", 1e-6),
        proved_for_all("drift of b - q'(beta_k) / L^2", source, rows, lambda r: r["conserved"], "<=", 1e-6),
        proved_for_all("beta_k of the flow - root formula, relative", source, rows, lambda r: r["root"], "<=", 1e-5),
        proved_for_all("DEQ: b / (b0 + beta0^-3 / 3)", source, deq, lambda r: r["bias"] / r["bias_bound"], "<", 1),
        proved(
            "f0 = 0, c_k >= 1: DEQ's unseen error / 4 c_k^2 at beta0 = 1",
            source,
            max(r["gotu"] / r["lowest"] for r in deq if r["f0"] == 0 and r["ck"] >= 1 and r["beta0"] == 1),
            "<",
            1,
            "4 c_k^2 is the error of the interpolator of lowest degree",
        ),
    ]


def _start_claims(rows: list[dict]) -> list[Claim]:
    """Is the DEQ's unseen error below that of the diagonal nets: at the customary starts, and at one start for all?"""
    claims = []
    for start in sorted({r["start"] for r in rows}, key=lambda s: s != "customary"):
        of_start = [r for r in rows if r["start"] == start and r["f0"] == 0 and r["ck"] >= 1]
        error = {(r["model"], r["ck"]): r["gotu"] for r in of_start}
        cks = sorted({ck for _, ck in error})
        ratios = {ck: min(error["depth 2", ck], error["depth 3", ck]) / error["DEQ", ck] for ck in cks}
        worst = min(ratios, key=ratios.get)
        claims.append((start, ratios[worst], f"c_k = {worst}; of c_k in {cks}, f0 = 0"))
    reversed_ = [start for start, ratio, _ in claims[1:] if not ratio > 1]
    made = []
    for start, ratio, note in claims:
        verdict = NOT_REPRODUCED if not ratio > 1 else REPRODUCED if start == "customary" else CONDITIONAL
        if verdict == REPRODUCED and reversed_:
            verdict, note = CONFOUNDED, f"{note}; reversed or gone at equal starts ({', '.join(reversed_)})"
        made.append(Claim(f"linear, {start}: error of depth 2 and 3 / DEQ's", "Eq. 13", ratio, ">", 1, verdict, note))
    return made


def _linear_table(rows: list[dict]) -> Table:
    cells = []
    starts = list(dict.fromkeys(r["start"] for r in rows))
    for f0, ck in LINEAR:
        of = {(r["model"], r["start"]): r["gotu"] for r in rows if (r["f0"], r["ck"]) == (f0, ck)}
        lowest = next(r["lowest"] for r in rows if r["ck"] == ck)
        cells.append((f"{f0:g}", f"{ck:g}", number(lowest), *(number(of[m, s]) for s in starts[:2] for m in MEMBERS)))
    columns = (
        "f0",
        "c_k",
        "lowest degree",
        *(f"{m}{'' if s == 'customary' else '*'}" for s in starts[:2] for m in MEMBERS),
    )
    return Table("Unseen error, linear f; customary starts, and * all from beta0 = 1", columns, cells)


def _trained_table(task: str, rows: list[dict]) -> Table:
    return Table(
        f"{task}: {TASKS[task].formula}; unseen error, lowest degree {number(rows[0]['lowest'])}",
        (*FIT_COLUMNS[:4], "unseen", *FIT_COLUMNS[5:6], "unseen x10"),
        fit_table_rows(rows),
    )


def draw(linear: list[dict], trained: dict[str, list[dict]]) -> Figure:
    """Unseen error against c_k at customary and equal starts, and of trained nets."""
    from . import _plot

    colours = {"DEQ": _plot.BLUE, "depth 2": _plot.ORANGE, "depth 3": _plot.VERMILION}

    @_plot.styled
    def paint() -> Figure:
        fig, axes = _plot.figure(3, (10, 4), width_ratios=(1, 1, 1.2))
        for ax, start in zip(axes, ("customary", "beta0 = 1.0"), strict=False):
            for name, colour in colours.items():
                points = sorted(
                    (r["ck"], r["gotu"]) for r in linear if (r["model"], r["start"], r["f0"]) == (name, start, 0)
                )
                ax.plot(*zip(*points, strict=True), "o-", color=colour, label=name, ms=4)
            c = torch.linspace(0.4, 3, 50)
            ax.plot(c, 4 * c**2, color=_plot.GREY, lw=1, ls="--", label="lowest degree")
            ax.set_yscale("log")
            ax.set_ylim(1e-3, 60)
            ax.set_xlabel("$c_k$ of the unseen coordinate")
            ax.set_title("linear f, " + ("customary start" if start == "customary" else "all from $\\beta_0 = 1$"))
            _plot.sparse_ticks(ax.yaxis)
        axes[0].set_ylabel("error on the unseen half")
        axes[1].legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.68), fontsize=8)
        ax, y, labels = axes[2], 0, []
        for task, rows in trained.items():
            for r, colour in zip(rows, (_plot.BLUE, _plot.SKY, _plot.VERMILION), strict=True):
                errors = [v for v in r["mse"] if v is not None]
                ax.plot(errors, [y] * len(errors), "o", color=colour, ms=4, mew=0, alpha=0.6)
                ax.plot([spread(r["mse"]).median] * 2, [y - 0.35, y + 0.35], color=colour, lw=2)
                labels.append((y, f"{task}: {r['model'].partition(' ')[0]}", colour))
                y += 1
            ax.plot([rows[0]["lowest"]] * 2, [y - 3.4, y - 0.6], color=_plot.GREY, ls="--", lw=1)
            y += 0.6
        ax.set_yticks([v[0] for v in labels], [v[1] for v in labels], fontsize=8)
        for tick, (_, _, colour) in zip(ax.get_yticklabels(), labels, strict=True):
            tick.set_color(colour)
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlabel("error on the unseen part")
        _plot.sparse_ticks(ax.xaxis)
        ax.set_title("trained (dashed: lowest degree)")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="gotu",
    title="Generalisation on the unseen",
    claim=(
        "On a part of the Boolean cube that training never saw, a DEQ makes a smaller error than diagonal linear nets "
        "and feed-forward nets, which tend to the interpolator of lowest degree."
    ),
    function=run_gotu,
    width_means="neurons of the trained DEQs",
    holds=lambda width, seeds: TRAINED * seeds * (WIDER * width) ** 2,
    width=(20, 8, 256),
    seeds=(8, 2, 32),
    config=CONFIG,
)
