"""Decides how a solve runs on a GPU: by what the formulas of deq/gpu_times.py expect, never by trying at run time.

Three regimes, by where W stays between iterations:

    resident    one block holds W in its shared memory and solves its own samples to the end, in one launch
    grid        as many multiprocessors as it takes hold W together, in shared memory and registers, and solve a
                share of the samples; a barrier between iterations
    cell        one fused kernel an iteration streams W from L2 or memory, in a captured graph; any size

What is chosen has the shortest solve by the clock, the host's part included.
"""

from dataclasses import dataclass
from functools import lru_cache

from .gpu_device import Device
from .gpu_times import ANCHOR_EVERY, PRECISIONS, REGIMES, Expected, expected, tiles_of
from .kernels.tiles import Tiles, step_tiles

WORTH_IT = 0.94  # coarser increments must take at most this share of the time of finer ones, or of none
INCREMENTS = ("native", "bfloat16", "float16", "float8")  # what iterations between two anchors multiply in
TRITON_INCREMENTS = ("native", "bfloat16", "float8")  # those that the Triton backend has kernels for
# What multiplies as accurately as plain PyTorch in a dtype. 16-bit problems are solved in float32 and rounded once.
ACCURATE = {"float64": "float64", "float32": "tf32x3", "bfloat16": "tf32x3", "float16": "tf32x3"}
ON_CUDA = ("resident cuda", "grid")  # the regimes of the CUDA backend; Triton has the others
WHERE = {
    "resident": "W stays in the shared memory of one multiprocessor",
    "resident cuda": "W stays in the shared memory of one multiprocessor",
    "grid": "W stays in the shared memory and registers of several multiprocessors",
    "cell": "W is streamed, one fused kernel an iteration",
}


@dataclass(frozen=True)
class GpuPlan:
    """What will be run, and ``why`` in words.

    regime: of :data:`REGIMES`. tiles: of one program. precision: of :data:`PRECISIONS`, of the evaluations that judge a
    sample. increments: of those between them; "native" if there are none. split_k: programs that share the inner
    dimension of one tile. expected_us: one iteration of the whole batch.
    """

    regime: str
    tiles: Tiles
    precision: str
    increments: str
    split_k: int
    expected_us: float
    why: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.regime}, {self.precision}, tiles {self.tiles}"]
        if self.increments != "native":
            parts.append(f"{self.increments} increments")
        if self.split_k > 1:
            parts.append(f"inner dimension in {self.split_k} pieces")
        return ", ".join(parts)


def fastest(regime: str, m: int, B: int, device: Device) -> Expected | None:
    """The shortest solve of a float32 problem in a regime, as its backend has it: CUDA's kernels judge in float32 and
    multiply bfloat16 in between, Triton's judge by three products of tf32. None where it cannot run."""
    kinds, precision = (("bfloat16",), "ieee") if regime in ON_CUDA else (TRITON_INCREMENTS, ACCURATE["float32"])
    return _best([option for kind in kinds if (option := expected(regime, m, B, device, precision, kind)) is not None])


def _best(options: list[Expected]) -> Expected | None:
    """The shortest solve, with coarser increments only where they are :data:`WORTH_IT`."""
    best = None
    for kind in INCREMENTS:  # from precise to coarse
        same = [option for option in options if option.increments == kind]
        rival = min(same, key=lambda option: option.solve, default=None)
        if rival is not None and (best is None or rival.solve <= WORTH_IT * best.solve):
            best = rival
    return best


@lru_cache(maxsize=1024)
def choose(
    m: int,
    B: int,
    *,
    dtype: str,
    device: Device,
    allowed: tuple[str, ...] = ("resident", "cell"),
    increments: tuple[str, ...] = ("native",),
    precision: str | None = None,
) -> GpuPlan:
    """The regime and increments with the least expected time for a solve of :data:`ITERATIONS` iterations, coarser
    increments only where they are :data:`WORTH_IT`.

    m >= 1, B >= 0: width and batch. dtype: "float32" | "float64" | "bfloat16" | "float16" of the problem. device:
    :func:`deq.gpu_device.find_device`. allowed, increments: of :data:`REGIMES` and :data:`INCREMENTS`, what the backend
    can run here; float64 has no increments. precision: of :data:`PRECISIONS`, of the evaluations that judge; None for
    one that is as accurate as plain PyTorch.
    Raises ValueError for a wrong size or an unknown name, or if nothing allowed can run.
    """
    _check(m, B, dtype, allowed, increments, precision)
    judging = precision or ACCURATE[dtype]
    found = [
        option
        for regime in allowed
        for kind in (increments if dtype != "float64" else ("native",))
        if (option := expected(regime, m, B, device, judging, kind)) is not None
    ]
    if not found:
        raise ValueError(
            f"allowed must hold a regime that can run m = {m}, B = {B} on {device.name} with increments of "
            f"{increments}; got {allowed}"
        )
    best = _best(found)
    kept = judging if best.increments == "native" else best.increments
    return GpuPlan(
        regime=best.regime,
        tiles=tiles_of(best.regime, m, B, device, kept),
        precision=judging,
        increments=best.increments,
        split_k=step_tiles(B, m)[1] if best.regime == "cell" and best.increments == "native" else 1,
        expected_us=1e6 * best.iteration,
        why=tuple(_reasons(best, found, dtype, device)),
    )


def _reasons(best: Expected, found: list[Expected], dtype: str, device: Device) -> list[str]:
    why = [f"{best.regime}: {WHERE[best.regime]}; {1e6 * best.iteration:.3g} us an iteration expected"]
    rivals: dict[str, float] = {}
    for option in found:
        if option.regime != best.regime:
            rivals[option.regime] = min(option.iteration, rivals.get(option.regime, option.iteration))
    why += [f"{regime} would take {1e6 * seconds:.3g} us" for regime, seconds in rivals.items()]
    if best.precision == ACCURATE[dtype]:
        why.append(f"{best.precision}: as accurate as plain PyTorch in {dtype}")
    if best.increments != "native":
        every = ANCHOR_EVERY[best.increments]
        why.append(f"{best.increments} increments between anchors in {best.precision}, about one in {every}")
    if device.stands_for:
        why.append(f"constants of the {device.stands_for}: those of {device.name} are not known (deq bench constants)")
    return why


def _check(
    m: int, B: int, dtype: str, allowed: tuple[str, ...], increments: tuple[str, ...], precision: str | None
) -> None:
    if m < 1 or B < 0:
        raise ValueError(f"m must be at least 1 and B at least 0; got m = {m}, B = {B}")
    names = [("dtype", dtype, ACCURATE)]
    names += [("allowed", regime, REGIMES) for regime in allowed]
    names += [("increments", kind, INCREMENTS) for kind in increments]
    names += [("precision", precision, PRECISIONS)] if precision is not None else []
    for name, value, known in names:
        if value not in known:
            raise ValueError(f"{name} must be of {', '.join(map(repr, known))}; got {value!r}")
