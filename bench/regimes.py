"""``python -m bench.regimes``: every regime of deq/gpu_times.py on the same shapes, so that its formulas can be held to
what solves take (tests/test_gpu_plan.py).

A row is a regime and a shape: microseconds of the device alone, by the clock and of the host until it has launched all,
iterations, what the plan expects of one, and the kernels that took longest. Written to ``regimes.json`` in the folder
of the device after every row; Ctrl-C keeps what there is. On the CPU, in Triton's interpreter, it runs to be tried out.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import click
import torch

import deq
from deq.backends import cuda, triton_kind
from deq.gpu_plan import ON_CUDA, choose, fastest
from deq.gpu_times import REGIMES
from deq.solution import Solution

from .cases import TOL, Case
from .device import synchronize
from .options import need_folder, out_option, save, shapes_option
from .record import environment

# Where more than one regime can run, and those that only the streamed one can.
SHAPES = (
    *((64, 1), (64, 256), (64, 4096), (256, 1), (256, 256), (256, 1024), (256, 4096), (300, 64)),
    *((512, 1), (512, 32), (1024, 1), (1024, 32), (2048, 1), (2048, 32), (4096, 1), (4096, 8)),
    *((1024, 256), (2048, 256), (1024, 4096), (4096, 4096)),
)
WARM_UPS, CALLS, PROFILED = 3, 9, 2  # solves of each kind
KERNELS = 5  # that a row lists


@contextmanager
def forced(regime: str) -> Iterator[str]:
    """Solves run in this regime; gives the backend to ask for."""
    if regime in ON_CUDA:
        with patch.object(cuda, "regime_for", lambda *_: cuda.PLANNED[regime]):
            yield "cuda"
    else:
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


def _profile(run: Callable[[], object], device: torch.device) -> dict[str, tuple[float, float]]:
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
    need_folder(out)
    plans = triton_kind.constants_of(torch.device(device))
    usable = [regime for regime in REGIMES if regime not in ON_CUDA or not deq.info().backends["cuda"]]
    where, rows, path = environment(device), [], None
    for m, B in shapes or SHAPES:
        for regime in usable:
            option = fastest(regime, m, B, plans)
            if option is None:
                continue
            try:
                row = measure(m, B, regime, torch.device(device))
            except (RuntimeError, ValueError) as error:  # out of memory, say: the others go on
                click.echo(f"{m:>5} x {B:<5} {regime:<14} {str(error).splitlines()[0]}")
                continue
            expected = 1e6 * option.iteration
            rows.append(row | {"expected_us": expected} | where)
            path = save(rows, out, "regimes", device)
            alone = "" if row["device_us"] is None else f"{row['device_us']:9.0f} us of the device"
            total = expected * row["iterations"]
            click.echo(f"{m:>5} x {B:<5} {regime:<14}{row['clock_us']:9.0f} us{alone}, expected {total:.0f}")
    if path:
        click.echo(f"Written to {path}")


if __name__ == "__main__":
    main()
