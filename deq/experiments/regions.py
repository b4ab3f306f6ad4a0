"""Theorem 1 and Proposition 1: a DEQ of m neurons has 2^m linear regions, counted exactly."""

import math
import random
from collections.abc import Callable

import numpy as np
import torch

from ..solve import solve
from ._precision import BEYOND, LIMITS, iterated_exactly, solve_rescaled
from ._result import CONDITIONAL, NOT_REPRODUCED, REPRODUCED, Claim, Result, Table, number, proved, proved_for_all
from ._run import Experiment, Part, Run, Tick
from ._sawtooth import (
    Pieces,
    as_float,
    deq_parameters,
    evaluations_to_fixed_point,
    examine,
    grid,
    injection,
    iterate,
    moved_from_answer,
    parameters,
    piece_bound,
    relu,
    spread_neurons,
    weight,
    widest,
)

EXACT = 22  # width up to which every region is counted; 2^22 of them take about five seconds
EXACT_ITERATION = 16  # the same for iterating at every grid point, which costs m times as much
LARGEST = 1000  # integers of so many bits are still quick
SAMPLES = 64  # regions looked at for each width above EXACT
CHUNK = 2**12  # grid points at a time: the arrays stay in cache
PRECISIONS = {"float32": (torch.float32, 23), "float64": (torch.float64, 52)}  # largest exact m: significand bits - 1
DEPTHS = (1, 2, 4, 8)  # hidden layers of the feed-forward nets in the table


def run_regions(run: Run) -> Result:
    """The function of the registry entry."""
    from ._regions_figure import draw

    width, quick = run.settings.width, run.settings.quick
    exact = list(range(1, min(width, EXACT) + 1))
    doubled = (EXACT * 2 ** (i / 2) for i in range(1, 12))
    sampled = sorted({int(m) for m in doubled if 1.2 * m < width} | {width}) if width > EXACT else []
    parts = [Part(f"count/{m}", f"count the regions of width {m}", _counting(m)) for m in exact]
    parts += [Part(f"sample/{m}", f"sample regions of width {m}", _sampling(run, m)) for m in sampled]
    for name, (_, limit) in PRECISIONS.items():
        label = f"deq.solve in {name}, widths 1 to {limit + 2}"
        parts.append(Part(name, label, _solving(run, name, limit, 8 if quick else 64)))
    parts.append(Part("iterated", "plain iteration in every precision", _iterating(run, 8 if quick else 64)))
    parts.append(Part("rescaled", "the rescaled form beyond the range of floats", lambda tick: _rescaling()))
    values = run.parts(parts)

    counted = [values[f"count/{m}"] for m in exact]
    looked = [values[f"sample/{m}"] for m in sampled]
    solved = {name: values[name] for name in PRECISIONS}
    bounds = [_bounds(m) for m in exact]
    notes = [
        f"Counted: every grid point j / 2^(m+1) in integers, m = 1 to {exact[-1]}; iterations up to m = "
        f"{min(exact[-1], EXACT_ITERATION)} at every point.",
        *([f"Beyond m = {EXACT}: {SAMPLES} regions a width sampled in integers, not counted."] if sampled else []),
        *(_precision_note(name, rows) for name, rows in solved.items()),
        "Feed-forward: prod(n + 1) bounds the pieces of a ReLU net with hidden widths n and one input; depth counts "
        "hidden layers; width: neurons a layer with which depth 2 could reach 2^m.",
    ]
    record = {"counted": counted, "sampled": looked, "solved": solved, "bounds": bounds}
    record |= {"iterated": values["iterated"], "rescaled": values["rescaled"]}
    tables = [_table(counted, looked, bounds)]
    claims = [*_claims(counted, looked, solved, bounds), *_precision_claims(values["iterated"], values["rescaled"])]
    return Result(claims, tables, record, draw(counted, bounds), notes)


# --- integers --------------------------------------------------------------------------------------------------------


def _counting(m: int) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        cells = 2 ** (m + 1)
        pieces, evaluations, moved = Pieces(0, 0, 0, 0, 0, 0, 0, 0), 0, 0
        for start in range(0, cells, CHUNK):
            # Two points beyond the chunk: every interior grid point is the interior of exactly one chunk.
            k = grid(m, np.arange(start, min(start + CHUNK + 1, cells) + 1))
            pieces += examine(m, k[None])
            moved += moved_from_answer(m, k)
            if m <= EXACT_ITERATION:
                evaluations = max(evaluations, evaluations_to_fixed_point(m, k))
            tick(min(1.0, (start + CHUNK) / cells))
        return {"m": m, "case": f"m = {m}"} | summary(pieces, moved) | {"evaluations": evaluations or None}

    return compute


def summary(pieces: Pieces, moved: int) -> dict:
    """Linear pieces, one more than kinks, of the vector map and of three scalar outputs; everything out of place."""
    return {
        "regions": pieces.kinks + 1,
        "pieces_last": pieces.kinks_last + 1,
        "pieces_sum": pieces.kinks_sum + 1,
        "pieces_staircase": pieces.kinks_staircase + 1,
        "misplaced": pieces.misplaced,
        "bent": pieces.bent,
        "unlike_gray": pieces.unlike_gray,
        "unlike_tent": pieces.unlike_tent,
        "moved": moved,
    }


def _sampling(run: Run, m: int) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        j = _some_regions(run, m, SAMPLES)
        k = grid(
            m, [[2 * i, 2 * i + 1, 2 * i + 2, 2 * i + 3] for i in j[:-1]]
        )  # the last region has no right neighbour
        pieces, at = examine(m, k), grid(m, [2 * i + 1 for i in j[:: len(j) // 4]])
        evaluations = evaluations_to_fixed_point(m, at) if m <= 256 else None
        found = summary(pieces, moved_from_answer(m, k))
        kept = {name: found[name] for name in ("misplaced", "bent", "unlike_gray", "unlike_tent", "moved")}
        return {"m": m, "case": f"m = {m}, sampled", "samples": len(j)} | kept | {"evaluations": evaluations}

    return compute


def _some_regions(run: Run, m: int, count: int) -> list[int]:
    """All regions if they are few, else the ends, the middle and random ones; sorted."""
    n = 2**m
    if n <= 2 * count:
        return list(range(n))
    draw = random.Random(f"{run.settings.seed}/{m}")
    chosen = {0, 1, n // 3, n // 2 - 1, n // 2, 2 * n // 3, n - 1}
    while len(chosen) < count:
        chosen.add(draw.randrange(n))
    return sorted(chosen)


# --- the engine ------------------------------------------------------------------------------------------------------


def _solving(run: Run, name: str, limit: int, count: int) -> Callable[[Tick], list[dict]]:
    """Midpoints of regions through deq.solve, two widths past the one where the dtype stops holding the midpoints."""

    def compute(tick: Tick) -> list[dict]:
        rows = []
        for m in range(1, limit + 3):
            rows.append(solve_midpoints(m, _some_regions(run, m, count), PRECISIONS[name][0], run.device))
            rows[-1] |= {"case": f"{name}, m = {m}", "within": m <= limit}
            tick(m / (limit + 2))
        return rows

    return compute


def solve_midpoints(m: int, regions: list[int], dtype: torch.dtype, device: torch.device | None = None) -> dict:
    """Solve at the midpoints of ``regions`` by the plain iteration, from zero and from the answer, and compare bits."""
    k = grid(m, [2 * j + 1 for j in regions])
    answer = as_float(m, relu(iterate(m, k)), dtype).to(device)
    W, c = weight(m, dtype).to(device), injection(m, k, dtype).to(device)
    options = {"solver": "plain", "tol": torch.finfo(dtype).tiny, "on_failure": "ignore"}  # only residual 0 converges
    sol = solve(W, c, "relu", max_iter=m + 1, **options)
    again = solve(W, c, "relu", max_iter=10 * (m + 1), **options)
    warm = solve(W, c, "relu", z0=answer, max_iter=1, **options)
    return {
        "m": m,
        "points": len(regions),
        "wrong": int((sol.z != answer).any(-1).sum()),
        "wrong_again": int((again.z != answer).any(-1).sum()),
        "worst_error": float((sol.z - answer).abs().max()),
        "residual": float(sol.residual.max()),
        "evaluations": int(sol.iterations.max()),
        "unconverged": int((~sol.converged).sum()),
        "unconverged_from_answer": int((~warm.converged).sum()),
    }


def _iterating(run: Run, count: int) -> Callable[[Tick], dict]:
    """The largest m up to which plain PyTorch in the dtype itself is exact at every midpoint tried, by dtype."""

    def compute(tick: Tick) -> dict:
        found = {}
        for i, (name, limit) in enumerate(LIMITS.items()):
            tried = {
                m: iterated_exactly(m, _some_regions(run, m, count), getattr(torch, name)) for m in range(1, limit + 3)
            }
            found[name] = next((m - 1 for m, exact in tried.items() if not exact), limit + 2)
            tick((i + 1) / len(LIMITS))
        return found

    return compute


def _rescaling() -> list[dict]:
    """Regions near 0, whose midpoints have few significant bits: there the range of the exponent is all that limits."""
    return [solve_rescaled(m, (0, 1, 2, 3, 7, 40, 100, 127), getattr(torch, name)) for name, m in BEYOND.items()]


def _precision_claims(iterated: dict[str, int], rows: list[dict]) -> list[Claim]:
    claims = [
        proved(f"{name}: largest m with exact midpoints", "Thm. 1", iterated[name], "==", limit, "plain iteration")
        for name, limit in LIMITS.items()
    ]
    widths = ", ".join(r["case"] for r in rows)
    claims.append(
        proved(
            "rescaled form: wrong entries", "Thm. 1", sum(r["wrong"] for r in rows), "==", 0, f"near x = 0; {widths}"
        )
    )
    return claims


# --- feed-forward nets -----------------------------------------------------------------------------------------------


def _bounds(m: int) -> dict:
    """Bounds on feed-forward nets of every depth below m with the DEQ's number of neurons, and of parameters."""
    budget = deq_parameters(m)
    nets = {depth: widest(depth, budget) for depth in range(1, m)}
    return {
        "m": m,
        "case": f"m = {m}",
        "parameters": budget,
        "same_neurons": {depth: piece_bound(spread_neurons(m, depth)) for depth in range(1, m)},
        "same_parameters": {depth: piece_bound(net) for depth, net in nets.items() if net},
        "parameters_used": {depth: parameters(net) for depth, net in nets.items() if net},
    }


# --- verdicts --------------------------------------------------------------------------------------------------------


def _claims(counted: list[dict], looked: list[dict], solved: dict[str, list[dict]], bounds: list[dict]) -> list[Claim]:
    both = [*counted, *looked]
    whole = [r for r in counted if r["evaluations"] is not None]
    part = [r for r in looked if r["evaluations"] is not None]

    def claim(
        statement: str, rows: list[dict], value: Callable[[dict], float], relation: str, required: float
    ) -> Claim:
        source = "Prop. 1" if statement.startswith(("linear", "break", "patterns")) else "Thm. 1"
        return proved_for_all(statement, source, rows, value, relation, required)

    claims = [
        claim("linear regions / 2^m", counted, lambda r: r["regions"] / 2 ** r["m"], "==", 1),
        claim("breakpoints off j / 2^m", both, lambda r: r["misplaced"] + r["bent"], "==", 0),
        claim("patterns off the Gray code", both, lambda r: r["unlike_gray"], "==", 0),
        claim("points off the tent map s' = 1 - 2|s|", both, lambda r: r["unlike_tent"], "==", 0),
        claim("pieces of z_m / (3 2^(m-2) + 1)", counted, lambda r: r["pieces_last"] / last_pieces(r["m"]), "==", 1),
        claim("pieces of sum z_t / 2^m", counted, lambda r: r["pieces_sum"] / 2 ** r["m"], "==", 1),
        claim("pieces of the staircase / 2^m", counted, lambda r: r["pieces_staircase"] / 2 ** r["m"], "==", 1),
        claim("most evaluations from zero / m", whole, lambda r: r["evaluations"] / r["m"], "==", 1),
        claim("entries that move from the answer", both, lambda r: r["moved"], "==", 0),
    ]
    if part:
        claims.append(claim("evaluations from zero / m, sampled", part, lambda r: r["evaluations"] / r["m"], "<=", 1))
    for name, rows in solved.items():
        within = [r for r in rows if r["within"]]
        top = within[-1]["m"]
        claims += [
            claim(f"{name}, m <= {top}: inexact solves", within, _failures, "==", 0),
            claim(f"{name}: evaluations of deq.solve - m", within, lambda r: r["evaluations"] - r["m"], "<=", 1),
        ]
    return [*claims, *_bound_claims(bounds)]


def _failures(row: dict) -> int:
    names = ("wrong", "wrong_again", "unconverged", "unconverged_from_answer")
    return sum(row[name] for name in names)


def last_pieces(m: int) -> int:
    """Pieces of z_m alone: fewer than 2^m, because its zeros join."""
    return 2 if m == 1 else 3 * 2 ** (m - 2) + 1


def _bound_claims(bounds: list[dict]) -> list[Claim]:
    neurons = [
        {"case": f"m = {b['m']}, depth {depth}", "share": bound / 2 ** b["m"]}
        for b in bounds
        for depth, bound in b["same_neurons"].items()
    ]
    if not neurons:  # m = 1 has no depth below it
        return []
    last = bounds[-1]
    m = last["m"]
    share = {depth: bound / 2**m for depth, bound in last["same_parameters"].items()}
    shallow = max(v for depth, v in share.items() if depth <= math.isqrt(m))
    beyond = [depth for depth, v in share.items() if v >= 1]
    verdict = NOT_REPRODUCED if shallow >= 1 else CONDITIONAL if beyond else REPRODUCED
    note = f"m = {m}, depth up to sqrt m"
    if beyond:
        note += f"; from depth {beyond[0]} on the bound exceeds 2^m, whether or not a net attains it"
    return [
        proved_for_all("feed-forward bound / 2^m, m neurons", "Remark 1", neurons, lambda r: r["share"], "<", 1),
        Claim("the same with the DEQ's parameters", "Thm. 1", shallow, "<", 1, verdict, note),
    ]


# --- table -----------------------------------------------------------------------------------------------------------


def _precision_note(name: str, rows: list[dict]) -> str:
    exact = [r["m"] for r in rows if not _failures(r)]
    first = next((r["m"] for r in rows if _failures(r)), None)
    worst = max(r["residual"] for r in rows if r["within"])
    end = f", not at {first}" if first else ""
    return (
        f"{name}: every region midpoint tried is bit-exact up to m = {max(exact)}{end}; worst residual {number(worst)}."
    )


def _table(counted: list[dict], looked: list[dict], bounds: list[dict]) -> Table:
    shown = sorted({1, 2, 5, 10, 14, 20, len(counted)} & set(range(1, len(counted) + 1)))
    rows = []
    for m in shown:
        bound = bounds[m - 1]
        cells = [number(bound["same_neurons"].get(depth)) for depth in DEPTHS]
        rows.append((str(m), str(counted[m - 1]["regions"]), str(bound["parameters"]), *cells, needed(m, 2)))
    for r in looked:
        cells = [number(piece_bound(spread_neurons(r["m"], depth))) for depth in DEPTHS]
        rows.append((str(r["m"]), "sampled", str(deq_parameters(r["m"])), *cells, needed(r["m"], 2)))
    columns = ("m", "DEQ", "params", *(f"depth {n}" for n in DEPTHS), "width")
    title = "Linear regions; bound on feed-forward nets of m neurons"
    return Table(title, columns, rows)


def needed(m: int, depth: int) -> str:
    """Neurons a layer for 2^m pieces at this depth: the smallest n with (n + 1)^depth >= 2^m."""
    if m / depth > 30:
        return f"2^{number(m / depth)}"
    n = math.ceil(2 ** (m / depth))
    while n**depth >= 2**m:
        n -= 1
    return str(n)


EXPERIMENT = Experiment(
    name="regions",
    title="Theorem 1: 2^m linear regions",
    claim=(
        "A ReLU DEQ of width m divides the unit interval into 2^m linear regions; a feed-forward net of depth m^a, "
        "a < 1, needs width exponential in m^(1-a) for as many."
    ),
    function=run_regions,
    width_means=f"largest m: counted exactly up to {EXACT}, sampled above",
    width=(20, 10, 22),
    largest_width=LARGEST,
)
