"""Rebuttal Fig. 1 and Fig. 4: weight norms that a DEQ and feed-forward nets need as the target steepens with d."""

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ._fit import fit
from ._judge import beats
from ._norm_nets import ScaledFeedForward, SelfLoopDEQ, largest_norm
from ._result import Claim, Result, Table, number, proved_for_all, spread
from ._run import Choice, Experiment, Part, Run, Tick
from ._steep_target import F64, binding_point, floor, target
from ._train import hold_then_fall

SHAPES = ((40, 2), (20, 3), (20, 4))  # width and weight matrices of the feed-forward nets
CONFIG = {
    "free": Choice((5, 10, 15, 20), "d where norms are free", quick=(5,), full=tuple(range(5, 21))),
    "capped": Choice((10, 16, 20), "d where norms are capped: the floor bites from 16 on", quick=(10,)),
    "cap": Choice(8.0, "of every infinity norm: depth 3 then has a Lipschitz constant of 512, about the slope 2^10"),
    "steps": Choice(3000, "of Adam; at 1500 the DEQ is twice as far off at d = 20", quick=20, full=20000),
    "rate": Choice(1e-2, "Adam, held while delta falls, then a line to 1 % over the last fifth"),
    "anneal": Choice(0.8, "of the steps in which delta falls from 2^-3 to 2^-d: without it nothing fits d = 20"),
    "batch": Choice(256, "t log-uniform in [delta / 16, 1], a sixteenth at 0"),
    "tests": Choice(4096, "points drawn in the same way"),
}


def run_norms(run: Run) -> Result:
    """The function of the registry entry."""
    config = run.config
    nets = _models(run.settings.width)
    jobs = [(d, config.cap, name) for d in config.capped for name in nets] + [
        (d, None, name) for d in config.free for name in nets
    ]
    parts = [
        Part(
            _key(d, cap, name),
            f"train {name}, d = {d}, {'cap ' + number(cap) if cap else 'free'}",
            _training(run, d, cap, name, nets[name]),
            run.settings.seeds * config.batch * 40,
        )
        for d, cap, name in jobs
    ]
    values = run.parts(parts)
    rows = {(d, cap): [values[_key(d, cap, name)] for name in nets] for d, cap, _ in jobs}
    notes = [
        "Input t = 1 - x_1 alone: with all d coordinates no model fits beyond d = 10. The DEQ has the shape of "
        "construction A of Theorem 2 (self loops, half of the neurons without bias); others failed at d = 20.",
        "Norm: the largest infinity norm of a weight matrix. All matrices have a trainable scale.",
        *(note for of_d in rows.values() for r in of_d for note in r["notes"]),
    ]
    return Result(_claims(run, rows), _tables(run, rows), values, draw(run, rows), notes)


def _key(d: int, cap: float | None, name: str) -> str:
    return f"{'cap' if cap else 'free'}/{d}/{name}"


def _models(width: int) -> dict[str, Callable]:
    made: dict[str, Callable] = {f"self-loop DEQ {width}": lambda S, g: SelfLoopDEQ(S, 1, width, g)}
    for n, depth in SHAPES:
        made[f"feed-forward {n}x{depth}"] = lambda S, g, n=n, depth=depth: ScaledFeedForward(S, 1, n, depth, g)
    return made


def sample(seeds: int, count: int, delta: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t (S, B, 1) log-uniform in [delta / 16, 1], 0 for a sixteenth, and g there (S, B)."""
    u = torch.rand(seeds, count, 1, dtype=F64, device=generator.device, generator=generator)
    t = torch.exp((1 - u) * math.log(delta / 16))
    t[:, : count // 16] = 0
    return t, target(t.squeeze(-1), delta)


def _training(run: Run, d: int, cap: float | None, name: str, make: Callable) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        config, S, delta = run.config, run.settings.seeds, 2.0**-d
        data, done = run.generator(f"data/{d}"), [0]

        def batch() -> tuple[Tensor, Tensor]:
            share = min(1.0, done[0] / (config.anneal * config.steps))
            done[0] += 1
            return sample(S, config.batch, 2.0 ** -(3 + (d - 3) * share), data)

        x, y = sample(1, config.tests, delta, run.generator(f"test/{d}"))
        x, y = x.expand(S, -1, -1), y.expand(S, -1)

        def inspect(net) -> dict:
            error = (net(x) - y).abs().amax(1)
            norms = net.norms()
            if isinstance(net, ScaledFeedForward):  # the pair of inputs at which its own norms force the floor
                pair = torch.zeros(S, 2, 1, dtype=F64, device=x.device)
                at = [binding_point(v, delta) for v in norms.prod(1).tolist()]
                pair[:, 1, 0] = torch.tensor(at, dtype=F64, device=x.device)
                error = torch.maximum(error, (net(pair) - target(pair.squeeze(-1), delta)).abs().amax(1))
            return {"sup": error.tolist(), "norm": largest_norm(net).tolist(), "product": norms.prod(1).tolist()}

        row = fit(
            run,
            name,
            make,
            batch,
            (x, y),
            tick,
            steps=config.steps,
            rate=config.rate,
            schedule=hold_then_fall(config.anneal),
            after=None if cap is None else lambda net: net.cap_(cap),
            inspect=inspect,
        )
        depth = int(name.rpartition("x")[2]) if "feed" in name else 0
        return row | {"d": d, "case": f"{name}, d = {d}", "depth": depth, "cap": cap}

    return compute


def _claims(run: Run, rows: dict) -> list[Claim]:
    every = [r for of_d in rows.values() for r in of_d if r["depth"]]
    floors = [
        {"case": f"{r['case']}, seed {s}", "excess": sup - floor(product, 2.0 ** -r["d"])}
        for r in every
        for s, (sup, product) in enumerate(zip(r["sup"], r["product"], strict=True))
        if sup is not None and product is not None
    ]
    capped = [
        {
            "case": r["case"],
            "excess": min(v for v in r["sup"] if v is not None) - floor(r["cap"] ** r["depth"], 2.0 ** -r["d"]),
        }
        for r in every
        if r["cap"]
    ]
    claims = [
        proved_for_all(
            "feed-forward: sup error - floor of its norms", "Thm. 2", floors, lambda r: r["excess"], ">=", 0
        ),
        proved_for_all("capped: sup error - floor of the cap", "Thm. 2", capped, lambda r: r["excess"], ">=", 0),
    ]
    for (d, cap), of_d in rows.items():
        deq, *others = of_d
        what = "sup" if cap else "norm"
        statement = f"norms capped at {cap:g}, d = {d}: sup error" if cap else f"free norms, d = {d}: norm"
        claims.append(
            beats(
                f"{statement}, feed-forward / DEQ",
                "rebuttal Fig. 1, Fig. 4",
                deq,
                others,
                what,
                quick=run.settings.quick,
                setting=f"input t, width {run.settings.width}, {run.config.steps} steps; best of {len(others)} nets",
                conditions="a DEQ of construction A's shape, input t alone"
                + ("" if cap else "; errors are not equal, see the table"),
            )
        )
    return claims


def _tables(run: Run, rows: dict) -> list[Table]:
    tables = []
    for title, wanted in ((f"Norms capped at {run.config.cap:g}", True), ("Free norms", False)):
        cells = [
            (
                str(d),
                r["model"],
                str(r["parameters"]),
                str(spread(r["sup"])),
                str(spread(r["norm"])),
                number(floor(cap ** r["depth"], 2.0**-d)) if cap and r["depth"] else "",
            )
            for (d, cap), of_d in rows.items()
            if bool(cap) == wanted
            for r in of_d
        ]
        tables.append(
            Table(
                f"{title}: median [quartiles] over seeds", ("d", "model", "params", "sup error", "norm", "floor"), cells
            )
        )
    return tables


def draw(run: Run, rows: dict) -> Figure:
    """Sup error under a cap with the floors, and free norms, against d."""
    from . import _plot

    colours = (_plot.BLUE, "#F5A66B", _plot.VERMILION, "#8C3A00")

    @_plot.styled
    def paint() -> Figure:
        fig, (capped, free) = _plot.figure(2, (10, 4))
        for ax, key, has_cap in ((capped, "sup", True), (free, "norm", False)):
            ds = [d for d, cap in rows if bool(cap) == has_cap]
            names = [r["model"] for r in next(iter(rows.values()))]
            for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
                of = [next(r for r in rows[d, run.config.cap if has_cap else None] if r["model"] == name) for d in ds]
                spreads = [spread(r[key]) for r in of]
                at = [d + 0.12 * (i - 1.5) for d in ds]
                bars = ([s.median - s.low for s in spreads], [s.high - s.median for s in spreads])
                ax.errorbar(at, [s.median for s in spreads], bars, fmt="o-", color=colour, lw=1.2, ms=4, label=name)
                if has_cap and i:
                    floors = [floor(run.config.cap ** of[0]["depth"], 2.0**-d) for d in ds]
                    ax.plot(at, floors, "_", color=colour, ms=16, mew=2)
            ax.set_xlabel("d (slope $2^d$)")
            ax.set_xticks(ds)
            ax.legend(frameon=False, fontsize=8)
        free.set_yscale("log")
        _plot.plain_ticks(free.yaxis)
        capped.set_ylabel("sup error, median and quartiles")
        capped.set_title(f"All norms at most {run.config.cap:g} (bars: provable floors)")
        free.set_ylabel("largest infinity norm")
        free.set_title("Norms free")
        return fig

    return paint()


EXPERIMENT = Experiment(
    name="norms",
    title="Weight norms against steepness",
    claim=(
        "As the steep target's d grows from 5 to 20, feed-forward nets need ever larger weights for one error; norms "
        "of a DEQ stay lower."
    ),
    function=run_norms,
    width_means="neurons of the DEQ",
    holds=lambda width, seeds: 8 * seeds * width**2,  # diag(w), of which the norm is taken
    width=(10, 6, 10),
    seeds=(8, 2, 32),
    config=CONFIG,
)
