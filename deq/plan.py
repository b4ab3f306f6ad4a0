"""Decides how a problem is run: pure Python, no tensors, so that every decision can be tested without a device."""

from dataclasses import dataclass
from functools import lru_cache

SOLVERS = ("auto", "plain", "anderson", "direct")
BACKENDS = ("auto", "cpu", "reference")
MAPS = ("plain",)  # what is iterated; Plan.map of a direct method (deq/structured.py) is that method's name
CRITERIA = ("residual", "error")

# Relative tolerance by input dtype: near the square root of what the dtype can resolve, and the habit of the field.
DEFAULT_TOL = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-4, "float16": 1e-4}
DEFAULT_MAX_ITER = 2000  # a contraction of 0.99 needs 1146 to reach 1e-5; converged samples have left long before
ANDERSON_DEPTH = 5


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
    why: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.map} map" if self.map in MAPS else self.map, f"{self.precision} on {self.backend}"]
        if self.acceleration != "none":
            parts.append(f"Anderson({self.depth}){' on demand' if self.acceleration == 'on_demand' else ''}")
        return ", ".join(parts)

    def explain(self) -> str:
        """The plan and its reasons, one line each."""
        return "\n".join((str(self), *(f"  {reason}" for reason in self.why)))


@lru_cache(maxsize=256)  # a front door that is asked the same thing at every step of a training run
def make_plan(
    *,
    dtype: str,
    device: str,
    solver: str = "auto",
    backend: str = "auto",
    criterion: str = "residual",
    tol: float | None = None,
    max_iter: int | None = None,
    compiled: bool,
) -> Plan:
    """Choose backend, map, precision and acceleration.

    dtype: "float32" | "float64" | "bfloat16" | "float16" of the injection; halves are solved in float32.
    device: torch device type of the injection.
    compiled: whether the compiled CPU kernels are loaded.
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
        else:
            why.append(f"reference: there is no fused backend for {device} tensors yet")
    elif backend == "cpu":
        if not compiled:
            raise ValueError("backend='cpu' needs the compiled library, which is not loaded; deq.info() says why")
        if device != "cpu":
            raise ValueError(f"backend='cpu' solves CPU tensors; c is on {device}")
    precision = "float64" if dtype == "float64" else "float32"
    if precision != dtype:
        why.append(f"float32: {dtype} cannot resolve a residual of 1e-4; solved in float32, rounded once at the end")
    acceleration = {"auto": "on_demand", "plain": "none", "anderson": "anderson", "direct": "none"}[solver]
    if solver == "auto":
        why.append("on demand: plain iteration, Anderson per sample where the measured contraction is slow")
    return Plan(
        backend=backend,
        map="plain",
        precision=precision,
        acceleration=acceleration,
        depth=ANDERSON_DEPTH,
        tol=DEFAULT_TOL[dtype] if tol is None else float(tol),
        max_iter=DEFAULT_MAX_ITER if max_iter is None else int(max_iter),
        criterion=criterion,
        why=tuple(why),
    )
