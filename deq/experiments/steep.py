"""Theorem 2: DEQs of modest size and weights reach steep functions that feed-forward nets of bounded norm cannot."""

import statistics
from collections.abc import Callable

from ._equilibria import moved
from ._judge import SEEDS, SIGNIFICANT, beats, kind_of
from ._lemma2 import check as lemma2
from ._result import (
    CONFOUNDED,
    FINITE_DEPTH,
    NOT_JUDGED,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    Result,
    Table,
    number,
    proved,
    proved_for_all,
    sign_test,
    spread,
)
from ._run import Experiment, Part, Run
from ._steep_built import POINTS, check_scalar_state, check_self_loops, solve_built
from ._steep_target import floor
from ._steep_trained import BATCH, models, train_one

BUILT, QUICK_BUILT = (5, 10, 15, 20, 25, 30), (5, 10, 30)  # dimensions d, delta = 2^-d, of the constructions
SOLVED = (4, 5, 6)  # of those that the engine solves: the plain iteration needs about 2^d steps
TRAINED = (6, 10)  # of the trained nets; from d = 16 on nothing learns from samples of the cube
STEPS, QUICK_STEPS = 3000, 200
WIDE, QUICK_WIDE = (4096, 65536), (4096,)  # widths at which both laws are checked once, at d = 20
LARGEST = 2**15  # wider ones would fail for memory only after the constructions, which take hours there
DRAWS = 10_000  # pairs of contractions for Lemma 2


def run_steep(run: Run) -> Result:
    """The function of the registry entry."""
    from ._steep_figure import draw

    quick, width = run.settings.quick, run.settings.width
    steps = QUICK_STEPS if quick else STEPS
    ds = QUICK_BUILT if quick else BUILT
    top = max(width, 32 if quick else 64)
    Ks = sorted({2**k for k in range(2, top.bit_length())} | {top})
    parts = [Part(f"built/{d}", f"constructions A and B, d = {d}", _building(run, d, Ks), top * POINTS) for d in ds]
    parts += [
        Part(f"solved/{d}", f"constructions by deq.solve, d = {d}", lambda tick, d=d: solve_built(d, run.device))
        for d in SOLVED
    ]
    parts.append(Part("lemma2", "Lemma 2 on random contractions", lambda tick: lemma2(DRAWS, run.generator("lemma2"))))
    parts += [
        Part(f"wide/{K}", f"constructions of width {K}", _building(run, 20, [K]), K * POINTS)
        for K in (QUICK_WIDE if quick else WIDE)
    ]
    nets = [(d, name, make) for d in TRAINED for name, make in models(width, d).items()]
    parts += [
        Part(
            f"trained/{d}/{name}",
            f"train {name}, d = {d}",
            lambda tick, d=d, make=make: train_one(run, d, make, steps, tick),
            run.settings.seeds * BATCH * width,
        )
        for d, name, make in nets
    ]
    values = run.parts(parts)

    wide = [row for K in (QUICK_WIDE if quick else WIDE) for row in values[f"wide/{K}"]]
    built = [row for d in ds for row in values[f"built/{d}"]]
    solved = [row for d in SOLVED for row in values[f"solved/{d}"]]
    trained = [values[f"trained/{d}/{name}"] | {"model": name, "case": f"{name}, d = {d}"} for d, name, _ in nets]
    claims = [*_proved([*built, *wide], solved, trained), *_lemma2_claims(values["lemma2"])]
    for d in TRAINED:
        of_d = [r for r in trained if r["d"] == d]
        claims += [_learned_better(d, of_d, quick), _below_floor(d, of_d, quick)]
    notes = [
        f"Training: Adam 1e-2, cosine decay, {steps} steps, batch {BATCH}, float64, {run.settings.seeds} seeds, one "
        "setting for all nets; t = 1 - x_1 log-uniform. Feed-forward nets have at least the parameters of the larger "
        "DEQ.",
        *(f"{r['case']}: a gradient overflowed, seed: step {r['overflowed']}." for r in trained if r["overflowed"]),
    ]
    if any(r["B_bisection"] is None for r in built):
        notes.append("B: bisections are left out where float64 does not resolve a slope of 2^-d to 1/K.")
    if quick:
        notes.append(f"Quick: {steps} steps are too few to judge training.")
    tables = [_built_table(ds, built), _trained_table(trained), _equilibrium_table(solved, trained)]
    record = {
        "built": built,
        "wide": wide,
        "lemma2": values["lemma2"],
        "solved": solved,
        "trained": trained,
        "steps": steps,
        "batch": BATCH,
    }
    return Result(claims, tables, record, draw(built, trained), notes)


def _building(run: Run, d: int, Ks: list[int]) -> Callable:
    def compute(tick: Callable[[float], None]) -> list[dict]:
        rows = []
        for i, K in enumerate(Ks):
            row = {"d": d, "K": K, "case": f"d = {d}, K = {K}"}
            rows.append(row | check_self_loops(d, K, run.device) | check_scalar_state(d, K, run.device))
            tick((i + 1) / len(Ks))
        return rows

    return compute


# --- verdicts --------------------------------------------------------------------------------------------------------


def _proved(built: list[dict], solved: list[dict], trained: list[dict]) -> list[Claim]:
    widths = sum(r["A_width"] != r["K"] or r["B_width"] != r["K"] + 3 for r in built)
    halved = [r for r in built if r["B_bisection"] is not None]
    vanilla = [r for r in built if r["lemma1"] is not None]
    equilibria = [*solved, *({"case": r["case"]} | r["equilibrium"] for r in trained if _is_deq(r))]
    floors = [
        {"case": f"{r['case']}, step {h['step']}, seed {s}", "excess": sup - floor(norms, 2.0 ** -r["d"])}
        for r in trained
        if not _is_deq(r)
        for h in r["history"]
        for s, (norms, sup) in enumerate(zip(h["norms"], h["sup"], strict=True))
        if norms is not None and sup is not None
    ]

    def claim(
        statement: str, rows: list[dict], value: Callable[[dict], float], relation: str, required: float
    ) -> Claim:
        return proved_for_all(
            statement, "Lemma 1" if "vanilla" in statement else "Thm. 2", rows, value, relation, required
        )

    return [
        claim("A: K^2 x sup error", built, lambda r: r["A_error"] * r["K"] ** 2, "<=", 1),
        claim("A: largest weight", built, lambda r: r["A_weight"], "<=", 1),
        claim("B: K x sup error", built, lambda r: r["B_error"] * r["K"], "<=", 1),
        claim("B: largest weight / K", built, lambda r: r["B_weight"] / r["K"], "<=", 1),
        proved("A has K neurons, B K + 3: exceptions", "Thm. 2", widths, "==", 0),
        claim("B: smallest slope of f; one root", built, lambda r: r["B_rise"], ">", 0),
        claim("B: K/2 x error, log2 K + 1 bisections", halved, lambda r: r["B_bisection"] * r["K"] / 2, "<=", 1),
        claim("B as vanilla DEQ: residual / rounding", vanilla, lambda r: r["lemma1"], "<=", 1),
        claim("B as vanilla DEQ: rank of W", vanilla, lambda r: r["lemma1_rank"], "==", 1),
        claim("deq.solve: error / law of A and B", solved, lambda r: r["law"], "<=", 1),
        claim("deq.solve - closed form, over bound", equilibria, lambda r: r["difference"], "<=", 1),
        claim("feed-forward: sup error - floor", floors, lambda r: r["excess"], ">=", 0),
    ]


def _lemma2_claims(row: dict) -> list[Claim]:
    drawn = f"{row['draws']} pairs of contractions; tightest ratio {number(row['tightest'])}"
    return [
        proved("fixed points further apart than allowed", "Lemma 2", row["violations"], "==", 0, drawn),
        proved("pairs that break the pointwise inequality", "Lemma 2, before", row["pointwise"], ">", 0, drawn),
    ]


def _is_deq(row: dict) -> bool:
    return "equilibrium" in row


def _learned_better(d: int, rows: list[dict], quick: bool) -> Claim:
    """Does the diagonal DEQ reach a lower median error than every feed-forward net? With a sign test over seeds."""
    deq = _diagonal(rows)
    statement = f"d = {d}: best feed-forward MSE / DEQ's"
    shown = {"evidence": _evidence(deq)}
    return beats(
        statement, "Fig. 1b", deq | shown, [r for r in rows if not _is_deq(r)], quick=quick, setting=_setting(deq)
    )


def _below_floor(d: int, rows: list[dict], quick: bool) -> Claim:
    """Is the trained diagonal DEQ where its weight norms would keep a feed-forward net out?"""
    deq = _diagonal(rows)
    ratios = [
        floor(norms, 2.0**-d) / sup if sup and norms is not None else 0.0
        for norms, sup in zip(deq["norms"], deq["sup"], strict=True)
    ]
    below, seeds = sum(r > 1 for r in ratios), len(ratios)
    ratio = statistics.median(ratios)
    verdict = REPRODUCED if ratio > 1 and sign_test(below, seeds) <= SIGNIFICANT else NOT_REPRODUCED
    evidence = _evidence(deq)
    kind = kind_of(evidence)
    if kind == FINITE_DEPTH:
        verdict = CONFOUNDED
    if quick or seeds < SEEDS:
        verdict = NOT_JUDGED
    note = f"{below} of {seeds} seeds are below the floor of their own norms; sup error over the test points"
    statement = f"d = {d}: floor at DEQ's norms / its sup error"
    of = {"setting": _setting(deq), "seeds": seeds, "kind": kind, "evidence": (evidence,)}
    return Claim(statement, "Thm. 2", ratio, ">", 1, verdict, note, **of)


def _evidence(deq: dict) -> dict:
    """What this trained DEQ shows of its equilibrium."""
    return {"model": deq["model"], "moved": moved(deq["equilibrium"])} | deq["equilibrium"]


def _setting(deq: dict) -> str:
    return f"{deq['parameters']} parameters, batch {BATCH}, x in [0, 1]^{deq['d']}"


def _diagonal(rows: list[dict]) -> dict:
    return next(r for r in rows if r["model"].startswith("diagonal"))


# --- tables ----------------------------------------------------------------------------------------------------------


def _built_table(ds: tuple[int, ...], built: list[dict]) -> Table:
    rows = []
    for d in ds:
        of_d = [r for r in built if r["d"] == d]
        worst = (
            max(r["A_error"] * r["K"] ** 2 for r in of_d),
            max(r["A_weight"] for r in of_d),
            max(r["B_error"] * r["K"] for r in of_d),
            max(r["B_weight"] / r["K"] for r in of_d),
            max((r["B_bisection"] * r["K"] / 2 for r in of_d if r["B_bisection"] is not None), default=None),
        )
        rows.append((str(d), number(2.0**d), *(number(v, 4) for v in worst)))
    columns = ("d", "slope", "A: K^2 error", "A: weight", "B: K error", "B: weight/K", "B: bisect")
    Ks = sorted({r["K"] for r in built})
    return Table(f"Constructions, worst of K = {Ks[0]} to {Ks[-1]}: at most 1 by theorem", columns, rows)


def _trained_table(trained: list[dict]) -> Table:
    rows = [
        (str(r["d"]), r["model"], str(r["parameters"]), str(spread(r["mse"])), str(spread(r["sup"]))) for r in trained
    ]
    return Table("Training, median [quartiles] over seeds", ("d", "net", "params", "test MSE", "sup error"), rows)


def _equilibrium_table(solved: list[dict], trained: list[dict]) -> Table:
    rows = []
    for r in [*solved, *({"net": r["model"], "d": r["d"]} | r["equilibrium"] for r in trained if _is_deq(r))]:
        shown = (r["residual"], r["metric"], r["residual_again"], r["metric_again"], moved(r))
        rows.append((r["net"], str(r["d"]), *map(number, shown)))
    columns = ("net", "d", "residual", "metric", "residual 2", "metric 2", "moved")
    return Table("Equilibria by deq.solve; 2: tol 1e-13, ten times the evaluations", columns, rows)


EXPERIMENT = Experiment(
    name="steep",
    title="Theorem 2: steep functions",
    claim=(
        "A DEQ approximates g(x) = delta / (1 + delta - x_1), delta = 2^-d, in sup norm with width and weights that do "
        "not grow with d, where a feed-forward net of bounded depth needs weights exponential in d."
    ),
    function=run_steep,
    width_means="neurons of the trained DEQs; the constructions go up to this width, at least to K = 64",
    width=(20, 20, 256),
    largest_width=LARGEST,
    holds=lambda width, seeds: 32 * seeds * width**2,  # float64
    largest_because=f"where a trained W, its gradient and Adam's moments take {LARGEST**2 * 32 >> 30} GiB a seed",
    seeds=(8, 3, 16),
)
