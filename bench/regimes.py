"""``python -m bench.regimes``: every regime of deq/gpu_plan.py on the same shapes, so that its formulas can be held to
what solves take (tests/test_gpu_plan.py).

A row is a regime and a shape: microseconds of the device alone, by the clock and of the host until it has launched all,
iterations, what the plan expects of one, and the kernels that took longest. Written to ``regimes.json`` in the folder
of the device after every row; Ctrl-C keeps what there is. On the CPU, in Triton's interpreter, it runs to be tried out.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import click
import torch

import deq
from deq.backends import cuda, load
from deq.gpu_device import Device, find_device
from deq.gpu_plan import REGIMES, TRITON_INCREMENTS, choose, expected
from deq.solution import Solution

from .cases import TOL, Case
from .cli import out_option, shapes_option
from .device import synchronize
from .record import device_name, environment, write

# Where more than one regime can run, and those that only the streamed one can.
SHAPES = (
    *((64, 1), (64, 256), (64, 4096), (256, 1), (256, 256), (256, 1024), (256, 4096), (300, 64)),
    *((512, 1), (512, 32), (1024, 1), (1024, 32), (2048, 1), (2048, 32), (4096, 1), (4096, 8)),
    *((1024, 256), (2048, 256), (1024, 4096), (4096, 4096)),
)
ON_CUDA = {"resident cuda": "block", "grid": "grid"}  # names of deq/backends/cuda.py
WARM_UPS, CALLS, PROFILED = 3, 9, 2  # solves of each kind
KERNELS = 5  # that a row lists


def options_of(m: int, B: int, plans: Device) -> Iterator[tuple[str, float]]:
    """The regimes that can solve a shape and that this machine has, with the seconds expected of an iteration."""
    for regime in REGIMES:
        if regime in ON_CUDA and deq.info().backends["cuda"]:  # why it cannot be used
            continue
        kinds, precision = (("bfloat16",), "ieee") if regime in ON_CUDA else (TRITON_INCREMENTS, "tf32x3")
        found = [option for kind in kinds if (option := expected(regime, m, B, plans, precision, kind)) is not None]
        if found:
            yield regime, min(found, key=lambda option: option.solve).iteration


@contextmanager
def forced(regime: str) -> Iterator[str]:
    """Solves run in this regime; gives the backend to ask for."""
    if regime in ON_CUDA:
        with patch.object(cuda, "regime_for", lambda *_: ON_CUDA[regime]):
            yield "cuda"
        return
    load("triton")
    from deq.backends import triton_kind

    with patch.object(triton_kind, "choose", partial(choose, allowed=(regime,))):
        yield "triton"


def measure(m: int, B: int, regime: str, device: torch.device) -> dict:
    """The row of a regime and a shape, without what was expected."""
    problem = Case(m, B).make().to(device)
    with forced(regime) as backend:

        def run() -> Solution:
            return deq.solve(problem.W, problem.c, "relu", tol=TOL, backend=backend, on_failure="ignore")

        for _ in range(WARM_UPS):
            solution = run()
        synchronize(device)
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            run()
            launched = time.perf_counter()
            synchronize(device)
            times.append((time.perf_counter() - start, launched - start))
        clock, host = sorted(times)[CALLS // 2]
        kernels = _profile(run, device)
    iterations = solution.iterations
    return {
        "m": m,
        "B": B,
        "regime": regime,
        "device_us": sum(us for _, us in kernels.values()) if kernels else None,
        "clock_us": 1e6 * clock,
        "host_us": 1e6 * host,
        "mean_iterations": float(iterations.double().mean()),
        "iterations": int(iterations.max()),
        "failed": int((~solution.converged).sum()),
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][1])[:KERNELS]),
    }


def _profile(run, device: torch.device) -> dict[str, tuple[float, float]]:
    """By kernel: how often a solve launches it, and microseconds of all those launches; nothing on the CPU."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(PROFILED):
            run()
        synchronize(device)
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    return {event.key: (event.count / PROFILED, event.self_device_time_total / PROFILED) for event in events}


@click.command()
@shapes_option
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@out_option
def main(shapes: tuple[tuple[int, int], ...], device: str, out: Path) -> None:
    """Every regime of a GPU solve on the same shapes. About two minutes, most of it compiling."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA GPU here")
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    plans = find_device(device_name("cuda"), capability) if device == "cuda" else find_device("H200")
    where, rows, path = environment(device), [], None
    for m, B in shapes or SHAPES:
        for regime, seconds in options_of(m, B, plans):
            try:
                row = measure(m, B, regime, torch.device(device))
            except (RuntimeError, ValueError) as error:  # out of memory, say: the others go on
                click.echo(f"{m:>5} x {B:<5} {regime:<14} {str(error).splitlines()[0]}")
                continue
            rows.append(row | {"expected_us": 1e6 * seconds} | where)
            path = write(rows, out, "regimes", device)
            alone = "" if row["device_us"] is None else f"{row['device_us']:9.0f} us of the device"
            each = 1e6 * seconds * row["iterations"]
            click.echo(f"{m:>5} x {B:<5} {regime:<14}{row['clock_us']:9.0f} us{alone}, expected {each:.0f}")
    if path:
        click.echo(f"Written to {path}")


if __name__ == "__main__":
    main()
