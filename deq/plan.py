"""Decides how a problem is run: pure Python, no tensors, so that every decision can be tested without a device."""

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

SOLVERS = ("auto", "plain", "anderson", "cayley", "direct")
BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
MAPS = ("plain", "cayley")  # what is iterated; Plan.map of a direct method (deq/direct) is that method's name
CRITERIA = ("residual", "error")

# Relative tolerance by input dtype: near the square root of what the dtype can resolve, and the habit of the field.
DEFAULT_TOL = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-4, "float16": 1e-4}
DEFAULT_MAX_ITER = 2000  # a contraction of 0.99 needs 1146 to reach 1e-5; converged samples have left long before
ANDERSON_DEPTH = 5
# What a step of the CPU backend multiplies (DeqPrecision in csrc/kernels.h): the iterate, or its increment, rounded.
INCREMENTS = {"native": 0, "int8": 1, "bfloat16": 2}
# Below this width a step on increments saves less than it costs (Zen 4, relu, forward: 64 x 256 0.8 x, 128 x 256 1.2 x,
# 256 x 256 1.4 x, 2048 x 16 1.9 x the speed of float32 with zeros skipped). At 80 x 256 a Gaussian W is 1.2 times as
# fast with them, but an outlier takes 1.5 times as long with two threads: its slow samples change the engine, those of
# float32 stay in it.
INCREMENTS_FROM = 96
INCREMENTS_TOL = 1e-6  # a tighter tolerance leaves the increments nothing to do but wait for float32 anchors
# Root mean square singular value ||W||_F / sqrt(m) above which the plain map is not tried first: a Gaussian W contracts
# up to 1.2 or so under relu; monotone ones start near 2.
LARGE_WEIGHT = 1.5
# Evaluations of the batch that forming K may cost: for a W that training is about to change, and for a frozen one.
CHEAP_TRAINING, CHEAP_FROZEN = 4.0, 64.0
RUNGS = ("cayley", "anderson", "tight cayley", "plain", "newton", "homotopy")
NOT_MONOTONE = ("gelu", "silu")  # the Cayley map needs a nondecreasing activation
BOUNDED = ("tanh", "sigmoid")  # homotopy needs one of bounded range


class LargeWeight(Exception):
    """A backend found that W is too large for a plan that holds ``unless_large``, and solved nothing."""


@dataclass(frozen=True)
class Plan:
    """What will be run. ``why`` holds one reason per choice, in words."""

    backend: str
    map: str
    precision: str
    acceleration: str  # "none" | "anderson" (from the start) | "on_demand" (per sample, once it is slow)
    depth: int
    tol: float
    max_iter: int
    criterion: str
    increments: str = "native"  # of INCREMENTS; float64 and Anderson from the start are always native. On a GPU of
    # those of deq/gpu_plan.py, of which "native" leaves the choice to the plan of the device
    adapts: bool = False  # fit() may still choose the map, the increments and the rungs for a weight
    reflects: bool = False  # the activation is one that the Cayley map can take
    bounded: bool = False  # the activation is, and homotopy leads to an equilibrium
    unless_large: bool = False  # the backend looks at W first, and raises LargeWeight
    rungs: tuple[str, ...] = ()  # of RUNGS, in order: what samples that fail are tried with (deq/solvers/ladder.py)
    why: tuple[str, ...] = ()
    # What :func:`deq.indicators.fitted` and the CPU backend have made of it: found here it costs 1 us, made anew or by
    # lru_cache 5 where caches are cold.
    kept: dict = field(init=False, repr=False, compare=False, default_factory=dict)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = (getattr(self, f.name) for f in fields(self) if f.compare)
        object.__setattr__(self, "_hash", hash(tuple(values)))

    def __hash__(self) -> int:
        """Computed once: a plan is part of a key at every call, and where caches are cold its fields take 10 us."""
        return self._hash

    def __reduce__(self) -> tuple:
        """Without the hash: of the same text it is another in every process."""
        return Plan, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def __str__(self) -> str:
        parts = [f"{self.map} map" if self.map in MAPS else self.map, f"{self.precision} on {self.backend}"]
        if self.increments != "native":
            parts.append(f"{self.increments} increments")
        if self.acceleration != "none":
            parts.append(f"Anderson({self.depth}){' on demand' if self.acceleration == 'on_demand' else ''}")
        return ", ".join(parts)

    def explain(self) -> str:
        """The plan and its reasons, one line each."""
        return "\n".join((str(self), *(f"  {reason}" for reason in self.why)))


@lru_cache(maxsize=512)
def varied(plan: Plan, **changes) -> Plan:
    """``dataclasses.replace``, remembered: a plan takes 10 us to make, and every rescue asks for the same six."""
    return replace(plan, **changes)


@lru_cache(maxsize=256)  # a front door that is asked the same thing at every step of a training run
def make_plan(
    *,
    dtype: str,
    device: str,
    activation: str = "relu",
    solver: str = "auto",
    backend: str = "auto",
    criterion: str = "residual",
    tol: float | None = None,
    max_iter: int | None = None,
    compiled: bool,
    why_no_triton: str = "nobody looked for it",
    why_no_cuda: str = "nobody looked for it",
) -> Plan:
    """Choose backend, map, precision and acceleration.

    dtype: "float32" | "float64" | "bfloat16" | "float16" of the injection; halves are solved in float32.
    device: of the injection, "cpu", "cuda:1", ...
    compiled: whether the compiled CPU kernels are loaded.
    why_no_triton: why the Triton backend cannot solve tensors of this device here, "" if it can.
    why_no_cuda: the same of the compiled CUDA kernels.
    Raises ValueError for an unknown solver, backend or criterion, or one that cannot run here.
    """
    for name, value, known in (
        ("solver", solver, SOLVERS),
        ("backend", backend, BACKENDS),
        ("criterion", criterion, CRITERIA),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
    why = []
    if backend == "auto":
        backend = "cpu" if device == "cpu" and compiled else "reference"
        if backend == "cpu":
            why.append("cpu: the compiled row engine serves every width and batch")
        elif device == "cpu":
            why.append("reference: no compiled library is loaded (deq.info() says why)")
        elif not why_no_cuda:
            backend = "cuda"
        elif why_no_triton:
            why.append(f"reference: backend triton cannot solve {device} tensors here: {why_no_triton}")
        else:
            backend = "triton"
    elif backend == "cpu":
        if not compiled:
            raise ValueError("backend='cpu' needs the compiled library, which is not loaded; deq.info() says why")
        if device != "cpu":
            raise ValueError(f"backend='cpu' solves CPU tensors; c is on {device}")
    elif backend == "triton" and why_no_triton:
        raise ValueError(f"backend='triton' cannot solve {device} tensors here: {why_no_triton}")
    elif backend == "cuda" and why_no_cuda:
        raise ValueError(f"backend='cuda' cannot solve {device} tensors here: {why_no_cuda}")
    if backend in ("triton", "cuda") and dtype == "float64":
        backend = "reference"
        why.append("reference: float64 has no tensor cores worth a kernel; it is solved in plain PyTorch")
    elif backend == "triton":
        why.append("triton: the kernels serve every width and batch in float32, products as three of tf32")
    elif backend == "cuda":
        why.append("cuda: W stays on the chip where it fits and that is expected to pay; else Triton's kernels solve")
    precision = "float64" if dtype == "float64" else "float32"
    if precision != dtype:
        why.append(f"float32: {dtype} cannot resolve a residual of 1e-4; solved in float32, rounded once at the end")
    acceleration = {"auto": "on_demand", "anderson": "anderson", "cayley": "on_demand"}.get(solver, "none")
    if solver == "cayley" and activation in NOT_MONOTONE:
        raise ValueError(f"solver='cayley' needs a nondecreasing activation; {activation} is not")
    if solver == "auto":
        why.append("on demand: plain iteration, Anderson per sample where the measured contraction is slow")
    reflects = activation not in NOT_MONOTONE
    on_gpu = backend in ("triton", "cuda") and device != "cpu"
    # Beside units that tanh or sigmoid saturates, whose pre-activations are large, the Cayley map ends short of the
    # tolerance, which is relative to these.
    rungs = ("cayley", "tight cayley", "anderson") if solver == "cayley" else ()
    if on_gpu and solver == "auto" and criterion == "residual":
        rungs = RUNGS if activation in BOUNDED else RUNGS[:-1]
        rungs = tuple(rung for rung in rungs if reflects or "cayley" not in rung)
        first = "newton on the device, then " if backend == "cuda" else ""
        why.append(f"samples that fail go on to: {first}{', '.join(rungs)}; at the latest when the status is read")
    return Plan(
        backend=backend,
        map="cayley" if solver == "cayley" else "plain",
        precision=precision,
        acceleration=acceleration,
        depth=ANDERSON_DEPTH,
        tol=DEFAULT_TOL[dtype] if tol is None else float(tol),
        max_iter=DEFAULT_MAX_ITER if max_iter is None else int(max_iter),
        criterion=criterion,
        adapts=solver == "auto" and criterion == "residual" and not on_gpu,  # the host would read what is on the GPU
        reflects=reflects,
        bounded=activation in BOUNDED,
        rungs=rungs,
        why=tuple(why),
    )


def fit(plan: Plan, width: int, batch: int, large: bool | None, frozen: bool, increments: str) -> Plan:
    """The plan of an automatic solve for one weight and batch.

    large: whether ``||W||_F / sqrt(m)`` is above ``LARGE_WEIGHT``, None if the backend is to look (LargeWeight);
    frozen: whether W is not being trained, so that what is derived from it will be used again; increments: those that
    the backend has here, "native" if none. Where the plain map contracts, the Cayley map is not tried first even with K
    at hand: its fewer int8 steps (26 for 39 at radius 1.0, m = 256) and the three float32 products that it adds take
    0.9 to 1.5 times as long.
    """
    why = list(plan.why)
    kind = "plain"
    if plan.reflects and large:
        kind = "cayley"
        why.append("Cayley map: W is too large for the plain map to contract")
    if width < INCREMENTS_FROM or plan.tol < INCREMENTS_TOL:
        increments = "native"
    if increments != "native":
        why.append(f"{increments} increments between float32 evaluations; slow samples take Gauss-Seidel sweeps")
    # The plain map with all its patience says how a sample failed, unless it had the first word already.
    rungs = [] if kind == "plain" and increments == "native" else ["anderson"]
    if kind == "cayley":  # has been, to a looser tolerance, and a sample that ended short of tol is a few steps away
        rungs = ["tight cayley", *rungs]
    elif plan.reflects:
        rungs = ["cayley", *rungs] if is_cheap(width, batch, frozen) else [*rungs, "cayley"]
        rungs.append("tight cayley")
    rungs += ["plain", "newton", *(["homotopy"] if plan.bounded else [])]
    why.append(f"samples that fail go on to: {', '.join(rungs)}")
    return replace(
        plan,
        map=kind,
        increments=increments,
        rungs=tuple(rungs),
        why=tuple(why),
        unless_large=large is None and plan.reflects,
    )


def is_cheap(width: int, batch: int, frozen: bool) -> bool:
    """Whether the matrix K of the Cayley map may be formed for the slow samples of such a batch."""
    evaluations = forming_cost(width) * width / max(batch, 1)
    return evaluations <= (CHEAP_FROZEN if frozen else CHEAP_TRAINING)


def forming_cost(width: int) -> float:
    """What K costs in products (m, m) x (m, m): 17 at m = 64, 5.7 at 128, 2.3 at 256, 1.4 at 512, 1.1 at 1024."""
    return 1.0 + (300.0 / width) ** 1.8
