"""Theorem 2: DEQs of modest size and weights reach steep functions that feed-forward nets of bounded norm cannot."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..plan import DEFAULT_MAX_ITER
from ..reference import cell
from ..solve import solve
from ._nets import DiagonalDEQ, EquilibriumNet, FeedForward, SeededNet, TriangularDEQ, matching_width
from ._result import (
    CONFOUNDED,
    INCONCLUSIVE,
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
from ._run import Experiment, Part, Run, Tick
from ._steep_target import F64, ScalarState, SelfLoops, binding_point, bisection_steps, floor, inputs, target
from ._train import train

TRAINED = (6, 10)  # dimensions d, delta = 2^-d, of the trained nets: from d = 16 on nothing learns from plain samples
DEPTHS = (2, 3, 4)  # weight matrices of the feed-forward nets
BATCH = 256
TESTS = 4096
EPS = torch.finfo(F64).eps
MOVED = 1e-3  # relative change of a metric, on solving more accurately, above which it did not measure an equilibrium


def run_steep(run: Run) -> Result:
    """The function of the registry entry."""
    from ._steep_figure import draw

    quick, width = run.settings.quick, run.settings.width
    ds = (5, 15, 30) if quick else (5, 10, 15, 20, 25, 30)
    top = max(width, 32 if quick else 64)
    Ks = sorted({2**k for k in range(2, top.bit_length())} | {top})
    parts = [Part(f"construct/{d}", f"constructions A and B, d = {d}", _constructing(run, d, Ks)) for d in ds]
    parts += [Part(f"engine/{d}", f"constructions through deq.solve, d = {d}", _solving(run, d)) for d in (4, 5, 6)]
    steps = 200 if quick else 3000
    for d in TRAINED:
        for name, make in _models(width, d).items():
            parts.append(Part(f"train/{d}/{name}", f"train {name}, d = {d}", _training(run, d, make, steps)))
    values = run.parts(parts)

    built = [row for d in ds for row in values[f"construct/{d}"]]
    solved = [row for d in (4, 5, 6) for row in values[f"engine/{d}"]]
    trained = [values[f"train/{d}/{name}"] | {"model": name} for d in TRAINED for name in _models(width, d)]
    claims = [*_proved(built, solved, trained), *(_learned(d, trained, quick) for d in TRAINED)]
    tables = [_construction_table(ds, built), _training_table(trained), _equilibrium_table(solved, trained)]
    notes = [
        f"Training: Adam 1e-2 with cosine decay, {steps} steps, batch {BATCH}, float64, {run.settings.seeds} seeds, one "
        "setting for all nets; test points: t = 1 - x_1 log-uniform.",
        "Feed-forward widths: the smallest with at least the parameters of the triangular DEQ.",
    ]
    if quick:
        notes.append(f"Quick: {steps} steps are too few to judge training.")
    record = {"constructions": built, "engine": solved, "training": trained, "steps": steps, "batch": BATCH}
    return Result(claims, tables, record, draw(built, trained), notes)


# --- constructions ---------------------------------------------------------------------------------------------------


def _constructing(run: Run, d: int, Ks: list[int]) -> Callable[[Tick], list[dict]]:
    def compute(tick: Tick) -> list[dict]:
        rows = []
        for i, K in enumerate(Ks):
            rows.append({"d": d, "K": K, "case": f"d = {d}, K = {K}"} | check_self_loops(d, K, run.device))
            rows[-1] |= check_scalar_state(d, K, run.device)
            tick((i + 1) / len(Ks))
        return rows

    return compute


def check_self_loops(d: int, K: int, device: torch.device | None = None) -> dict:
    """Construction A at delta = 2^-d: sup error of its exact equilibrium, width and largest weight."""
    delta = 2.0**-d
    net = SelfLoops.build(delta, K, device)
    t = inputs(delta, torch.cat((net.knots, net.knots.new_zeros(1))), 500)
    error = _by_chunks(lambda t: (net.readout(net.equilibrium(t)) - target(t, delta)).abs(), t, K)
    return {"A_error": float(error.max()), "A_weight": net.largest_weight(), "A_width": len(net.gain)}


def check_scalar_state(d: int, K: int, device: torch.device | None = None) -> dict:
    """Construction B at delta = 2^-d: sup error of the exact root and of bisection, width, weights, uniqueness, Lemma 1.

    "B_rise": smallest slope of f as the network's own weights give it; positive means one root.
    "lemma1": residual of h = relu(W z + U x + b) in the vanilla DEQ and |V h - z|, over the rounding of one evaluation.
    """
    delta = 2.0**-d
    net = ScalarState.build(delta, K, device=device)
    V, W, _, _ = net.layers()
    t = inputs(delta, net.below.clamp(max=1), 500)
    z = net.root(t)
    halved = _by_chunks(lambda t: net.bisect(t, bisection_steps(K)), t, K)
    some = t[:: max(1, len(t) // 64)]
    return {
        "B_error": float((z - target(t, delta)).abs().max()),
        "B_bisection": float((halved - target(t, delta)).abs().max()),
        "B_weight": net.largest_weight(),
        "B_width": len(V),
        "B_rise": float((-V[1 : K + 1]).cumsum(0).min()),
        "lemma1": _lemma1(ScalarState.build(delta, K, 1 / K, device), some),
        "lemma1_rank": int(torch.linalg.matrix_rank(torch.outer(W, V))) if K <= 512 else 1,
    }


def _lemma1(net: ScalarState, t: Tensor) -> float:
    """Largest residual of (h, z = V h) at the closed-form root, in units of the rounding error that evaluating it has."""
    V = net.layers()[0]
    z = net.root(t)
    h = net.hidden(z, t)
    weight, c = net.vanilla(t)
    residual = (cell(weight, c, h, "relu") - h).abs().amax(-1)
    state = (h @ V - z).abs()
    rounding = (len(V) + 4) * EPS * (h @ V.abs() + 1)  # of a sum of len(V) products, plus the root's own
    return float((torch.maximum(residual, state) / rounding).max())


def _by_chunks(f: Callable[[Tensor], Tensor], t: Tensor, K: int) -> Tensor:
    """f on pieces of t small enough that (piece, K) arrays stay below 32 MiB."""
    return torch.cat([f(piece) for piece in t.split(max(1, 2**22 // K))])


# --- the engine ------------------------------------------------------------------------------------------------------


def _solving(run: Run, d: int) -> Callable[[Tick], list[dict]]:
    """Constructions A and B (as Lemma 1's vanilla DEQ) solved from zero by the engine, K = 8."""

    def compute(tick: Tick) -> list[dict]:
        delta, K = 2.0**-d, 8
        a = SelfLoops.build(delta, K, run.device)
        t = inputs(delta, a.knots, 60)
        exact = a.equilibrium(t)
        rows = [
            _evidence(a.weight, a.injection(t), exact, lambda z: float((a.readout(z) - target(t, delta)).abs().max()))
        ]
        rows[0] |= {"d": d, "net": "construction A", "law": rows[0]["metric"] * K**2}
        tick(0.5)
        b = ScalarState.build(delta, K, 1 / K, run.device)
        V = b.layers()[0]
        weight, c = b.vanilla(t)
        root = b.root(t)
        rows.append(_evidence(weight, c, None, lambda h: float((h @ V - target(t, delta)).abs().max())))
        h = solve(weight, c, "relu", tol=1e-13, max_iter=10 * DEFAULT_MAX_ITER, on_failure="ignore").z
        state = h @ V
        slope = float(b.scale * b.slopes.min())
        rows[1] |= {"d": d, "net": "construction B", "law": rows[1]["metric"] * K}
        rounding = (K + 7) * EPS * (h @ V.abs() + 1)
        rows[1]["discrepancy"] = float(
            ((state - root).abs() * slope / ((b.step(state, t) - state).abs() + rounding)).max()
        )
        return [row | {"case": f"{row['net']}, d = {d}"} for row in rows]

    return compute


def _evidence(weight: Tensor, c: Tensor, exact: Tensor | None, metric: Callable[[Tensor], float]) -> dict:
    """Solve with the engine's defaults and again with ten times the evaluations and a tolerance 1000 times smaller.

    "discrepancy": |z - exact| over the bound (I - |W|)^-1 |f(z) - z| that holds for every W with spectral radius of |W|
    below 1, rounding of f included; at most 1 if both are the equilibrium.
    """
    first = solve(weight, c, "relu", on_failure="ignore")
    again = solve(weight, c, "relu", tol=1e-13, max_iter=10 * DEFAULT_MAX_ITER, on_failure="ignore")
    row = {
        "residual": float(first.residual.max()),
        "residual_again": float(again.residual.max()),
        "evaluations": int(first.iterations.max()),
        "evaluations_again": int(again.iterations.max()),
        "unconverged": int((~again.converged).sum()),
        "metric": metric(first.z),
        "metric_again": metric(again.z),
    }
    if exact is not None:
        z, size = again.z, weight.abs()
        rounding = (c.shape[-1] + 4) * EPS * (z @ size.mT + c.abs())
        defect = (cell(weight, c, z, "relu") - z).abs() + rounding
        eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
        bound = torch.linalg.solve_triangular((eye - size).mT, defect, upper=True, left=False)
        row["discrepancy"] = float(((z - exact).abs() / bound.clamp(min=torch.finfo(F64).tiny)).max())
    return row


# --- training --------------------------------------------------------------------------------------------------------


def _models(width: int, d: int) -> dict[str, Callable[[int, torch.Generator], SeededNet]]:
    """Constructors (seeds, generator) -> net by name; the names say width and, for feed-forward nets, depth."""
    models: dict[str, Callable[[int, torch.Generator], SeededNet]] = {
        f"diagonal DEQ {width}": lambda S, g: DiagonalDEQ(S, d, width, g),
        f"triangular DEQ {width}": lambda S, g: TriangularDEQ(S, d, width, g),
    }
    parameters = width * (d + 2) + 1 + width * (width - 1) // 2
    for depth in DEPTHS:
        n = matching_width(d, depth, parameters)
        models[f"feed-forward {n}x{depth}"] = lambda S, g, n=n, depth=depth: FeedForward(S, d, n, depth, g)
    return models


def sample(seeds: int, count: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (seeds, count, d) and g(x): t = 1 - x_1 log-uniform in [delta/8, 1] for all but an eighth, which is uniform but
    for a quarter of it at t = 0; other coordinates uniform. Uniform t alone almost never meets the rise."""
    delta, device = 2.0**-d, generator.device
    t = torch.exp(torch.rand(seeds, count, dtype=F64, device=device, generator=generator) * math.log(8 / delta)) * (
        delta / 8
    )
    eighth = count // 8
    t[:, :eighth] = torch.rand(seeds, eighth, dtype=F64, device=device, generator=generator)
    t[:, : eighth // 4] = 0
    x = torch.rand(seeds, count, d, dtype=F64, device=device, generator=generator)
    x[:, :, 0] = 1 - t
    return x, target(t, delta)


def _training(run: Run, d: int, make: Callable, steps: int) -> Callable[[Tick], dict]:
    def compute(tick: Tick) -> dict:
        S, delta = run.settings.seeds, 2.0**-d
        net = make(S, run.generator(f"init/{d}"))
        data = run.generator(f"data/{d}")
        x, y = sample(1, TESTS, d, run.generator(f"test/{d}"))
        x = x.expand(S, -1, -1)
        history = []

        def observe(step: int) -> None:
            error = (net(x) - y).abs()
            norms = net.norms()
            # A loop of norm below 1 bounds nothing from below: W counts as at least 1 in a DEQ's product.
            product = norms.clamp(min=1)[:, :1] * norms[:, 1:].prod(1, keepdim=True) if _is_deq(net) else norms.prod(1)
            product = product.flatten().tolist()
            sup = error.amax(1)
            if not _is_deq(net):
                pair = x[:, :2].clone()
                pair[:, 0, 0] = 1
                pair[:, 1] = pair[:, 0]
                pair[:, 1, 0] -= torch.tensor([binding_point(p, delta) for p in product], dtype=F64, device=x.device)
                sup = torch.maximum(sup, (net(pair) - target(1 - pair[..., 0], delta)).abs().amax(1))
            history.append(
                {"step": step, "norms": product, "sup": sup.tolist(), "mse": error.square().mean(1).tolist()}
            )
            tick(step / steps)

        checkpoints = sorted({0, steps, *(round(steps ** (i / 20)) for i in range(20)), *range(0, steps, steps // 20)})
        train(net, lambda: sample(S, BATCH, d, data), steps=steps, checkpoints=checkpoints, observe=observe)
        last = history[-1]
        row = {"d": d, "parameters": net.count, "mse": last["mse"], "sup": last["sup"], "history": history}
        if _is_deq(net):
            with torch.no_grad():
                row["equilibrium"] = _trained_evidence(net, x[:, :256], y[:, :256])
        return row

    return compute


def _is_deq(net: SeededNet) -> bool:
    return isinstance(net, EquilibriumNet)


def _trained_evidence(net: EquilibriumNet, x: Tensor, y: Tensor) -> dict:
    """The final nets solved from zero by the engine, against the closed form and against what training used."""
    c = net.injection(x)
    exact = net.closed_form(c)

    def metric(z: Tensor) -> float:
        return float((net.readout(z) - y).square().mean(1).median())

    row = _evidence(net.weight(), c, exact, metric)
    return row | {"metric_trained": metric(net.equilibrium(c)), "largest_gain": float(exact.max() / c.max())}


# --- verdicts --------------------------------------------------------------------------------------------------------


def _proved(built: list[dict], solved: list[dict], trained: list[dict]) -> list[Claim]:
    source = "Theorem 2"
    equilibria = [*solved, *(_case(row) | row["equilibrium"] for row in trained if "equilibrium" in row)]
    floors = [
        {
            "case": f"{row['model']}, d = {row['d']}, step {h['step']}, seed {s}",
            "excess": sup - floor(norms, 2.0 ** -row["d"]),
        }
        for row in trained
        if "equilibrium" not in row
        for h in row["history"]
        for s, (norms, sup) in enumerate(zip(h["norms"], h["sup"], strict=True))
        if norms is not None and sup is not None
    ]
    widths = sum(r["A_width"] != r["K"] or r["B_width"] != r["K"] + 3 for r in built)
    return [
        proved_for_all("A: K^2 x sup error", source, built, lambda r: r["A_error"] * r["K"] ** 2, "<=", 1),
        proved_for_all("A: largest weight", source, built, lambda r: r["A_weight"], "<=", 1),
        proved_for_all("B: K x sup error", source, built, lambda r: r["B_error"] * r["K"], "<=", 1),
        proved_for_all("B: largest weight / K", source, built, lambda r: r["B_weight"] / r["K"], "<=", 1),
        proved("A has K, B has K + 3 neurons: exceptions", source, widths, "==", 0),
        proved_for_all("B: smallest slope of f (root unique)", source, built, lambda r: r["B_rise"], ">", 0),
        proved_for_all(
            "B: K/2 x error of ceil(log2 K) + 1 bisections",
            source,
            built,
            lambda r: r["B_bisection"] * r["K"] / 2,
            "<=",
            1,
        ),
        proved_for_all("B as vanilla DEQ: residual / rounding", "Lemma 1", built, lambda r: r["lemma1"], "<=", 1),
        proved_for_all("B as vanilla DEQ: rank of its weight", "Lemma 1", built, lambda r: r["lemma1_rank"], "==", 1),
        proved_for_all("A, B by deq.solve: K^2, K x sup error", source, solved, lambda r: r["law"], "<=", 1),
        proved_for_all(
            "deq.solve vs closed form: difference / bound",
            "Uniqueness",
            equilibria,
            lambda r: r["discrepancy"],
            "<=",
            1,
        ),
        proved_for_all("feed-forward: sup error - norm floor", source, floors, lambda r: r["excess"], ">=", 0),
    ]


def _case(row: dict) -> dict:
    return {"case": f"{row['model']}, d = {row['d']}"}


def _learned(d: int, trained: list[dict], quick: bool) -> Claim:
    """Does the diagonal DEQ reach a lower median error than every feed-forward net? With a sign test over seeds."""
    rows = [r for r in trained if r["d"] == d]
    deq = next(r for r in rows if r["model"].startswith("diagonal"))
    others = [r for r in rows if "equilibrium" not in r]
    best = min(others, key=lambda r: spread(r["mse"]).median)
    ratio = spread(best["mse"]).median / spread(deq["mse"]).median
    wins = {r["model"]: sum(_less(a, b) for a, b in zip(deq["mse"], r["mse"], strict=True)) for r in others}
    seeds = len(deq["mse"])
    p = max(sign_test(w, seeds) for w in wins.values())
    evidence = deq["equilibrium"]
    moved = abs(evidence["metric_again"] - evidence["metric_trained"]) > MOVED * evidence["metric_trained"]
    if quick:
        verdict = NOT_JUDGED
    elif moved:
        verdict = CONFOUNDED
    elif ratio > 1:
        verdict = REPRODUCED if p <= 0.05 else INCONCLUSIVE
    else:
        verdict = NOT_REPRODUCED
    won = ", ".join(f"{w}/{seeds} against {name}" for name, w in wins.items())
    note = f"best feed-forward: {best['model']}; seeds won: {won}; sign test p <= {number(p)}"
    return Claim(f"d = {d}: best feed-forward MSE / diagonal DEQ's", "Figure 1(b)", ratio, ">", 1, verdict, note)


def _less(a: float | None, b: float | None) -> bool:
    return a is not None and (b is None or a < b)


# --- tables ----------------------------------------------------------------------------------------------------------


def _construction_table(ds: tuple[int, ...], built: list[dict]) -> Table:
    rows = []
    for d in ds:
        of_d = [r for r in built if r["d"] == d]
        worst = (
            max(r["A_error"] * r["K"] ** 2 for r in of_d),
            max(r["A_weight"] for r in of_d),
            max(r["B_error"] * r["K"] for r in of_d),
            max(r["B_weight"] / r["K"] for r in of_d),
            max(r["B_bisection"] * r["K"] / 2 for r in of_d),
        )
        rows.append((str(d), number(2.0**d), *map(number, worst)))
    title = f"Constructions, K = {built[0]['K']} to {built[-1]['K']}: worst case, each at most 1"
    return Table(title, ("d", "steepness", "A: K² err", "A: weight", "B: K err", "B: wt/K", "B: bisect"), rows)


def _training_table(trained: list[dict]) -> Table:
    rows = [
        (str(r["d"]), r["model"], str(r["parameters"]), str(spread(r["mse"])), str(spread(r["sup"]))) for r in trained
    ]
    return Table("Training: median [quartiles] over seeds", ("d", "net", "params", "test MSE", "sup error"), rows)


def _equilibrium_table(solved: list[dict], trained: list[dict]) -> Table:
    rows = []
    for r in [*solved, *({"net": r["model"], "d": r["d"]} | r["equilibrium"] for r in trained if "equilibrium" in r)]:
        moved = r["metric_again"] - r.get("metric_trained", r["metric"])
        shown = (r["residual"], r["residual_again"], r["metric"], moved)
        rows.append((r["net"], str(r["d"]), *map(number, shown), str(r["evaluations_again"])))
    columns = ("net", "d", "residual", "tighter", "metric", "moved by", "evals")
    return Table("Equilibria by deq.solve; tighter: 10x evaluations", columns, rows)


EXPERIMENT = Experiment(
    name="steep",
    title="Theorem 2: steep functions",
    claim=(
        "A DEQ approximates g(x) = delta / (1 + delta - x_1), delta = 2^-d, in sup norm with width and weights that do not "
        "grow with d, where a feed-forward net of bounded depth needs weights exponential in d."
    ),
    function=run_steep,
    width_means="neurons of the trained DEQs; the constructions go up to this width, at least to K = 64",
    width=(20, 20),
    seeds=(8, 3),
)
