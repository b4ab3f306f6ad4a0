"""The command ``deq bench``."""

from pathlib import Path

import click


class ShapeType(click.ParamType):
    """``M,B``: width and batch."""

    name = "M,B"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a width and a batch such as 256,64.", param, ctx)
        return int(parts[0]), int(parts[1])


out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench/results"),
    show_default=True,
    help="Folder for the JSON result; a folder named after the device is made in it.",
)


@click.group()
def bench() -> None:
    """Measure speed and memory against a torch loop, torchdeq and bare matrix products."""


@bench.command()
@click.option("--case", "shapes", type=ShapeType(), multiple=True, help="Only cases of this shape; repeatable.")
@click.option("--threads", type=click.IntRange(min=1), multiple=True, help="Repeatable; 1 and 2 if not given.")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=6.0, show_default=True, help="Per case."
)
@out_option
def cpu(shapes: tuple[tuple[int, int], ...], threads: tuple[int, ...], seconds: float, out: Path) -> None:
    """Forward + backward times on the CPU, as ratios over baselines that run in turns with deq.

    Ratios are medians over turns; 1 thread is timed by processor time, 2 by the clock: the machine should be idle.
    """
    from rich.console import Console
    from rich.progress import track

    from . import cpu as run
    from . import report
    from .cases import CPU_CASES, KERNEL_CASES, Case

    _need_compiled()
    cases = [case for case in CPU_CASES if not shapes or (case.m, case.B) in shapes]
    known = {(case.m, case.B) for case in cases}
    cases += [Case(m, B) for m, B in shapes if (m, B) not in known]
    console = Console()
    jobs = [(case, count) for count in threads or _default_threads() for case in cases]
    rows = []
    for case, count in track(jobs, "Measuring", console=console, transient=True):
        rows += run.measure(case, count, seconds)
    kernel = [] if shapes else run.measure_kernel(KERNEL_CASES, seconds)
    console.print(report.times(rows))
    if kernel:
        console.print(report.kernels(kernel))
    _finish(rows + kernel, out, "cpu", console)


@bench.command()
@click.option("--case", "shape", type=ShapeType(), help="Width and batch.  [default: 256,16384]")
@out_option
def memory(shape: tuple[int, int] | None, out: Path) -> None:
    """Peak memory of a solve and of its gradient beyond the inputs, each in a fresh process (Linux)."""
    from rich.console import Console

    from . import memory as run
    from . import report
    from .cases import MEMORY_CASE, Case

    _need_compiled()
    if not run.CLEAR.exists():
        raise click.ClickException(f"peak memory is read from Linux's {run.STATUS.parent}, which is not here")
    case = MEMORY_CASE if shape is None else Case(*shape)
    console = Console()
    with console.status("Measuring"):
        rows = run.measure(case)
    console.print(report.memory(rows))
    _finish(rows, out, "memory", console)


def _need_compiled() -> None:
    from deq import _library

    if _library.compiled is None:
        raise click.ClickException(f"there is nothing to measure without the compiled library: {_library.reason}")


def _default_threads() -> tuple[int, ...]:
    import torch

    return (1, 2) if torch.get_num_threads() > 1 else (1,)


def _finish(rows: list[dict], out: Path, name: str, console) -> None:
    from . import report
    from .record import environment, write

    where = environment()
    try:
        path = write([row | where for row in rows], out, name)
    except OSError as error:
        raise click.BadParameter(f"cannot write to {out}: {error.strerror}.", param_hint="--out") from error
    console.print(report.summary(rows))
    console.print(f"Written to {path}", soft_wrap=True)
