"""The command ``deq bench``."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from .options import (
    COUNT,
    Seconds,
    ShapeType,
    cannot_write,
    families_option,
    need_folder,
    out_option,
    pass_option,
    save,
    shapes_option,
    threads_option,
)


@click.group()
def bench() -> None:
    """Measure speed and memory against a torch loop, torchdeq and bare matrix products."""


@bench.command()
@shapes_option
@families_option
@pass_option
@threads_option
@click.option(
    "--seconds",
    type=Seconds(),
    default=2.0,
    show_default=True,
    help="Per case and number of threads.",
)
@out_option
def cpu(
    shapes: tuple[tuple[int, int], ...],
    families: tuple[str, ...],
    which: str | None,
    threads: tuple[int, ...],
    seconds: float,
    out: Path,
) -> None:
    """Times on the CPU as ratios over baselines that run in turns with deq, first of the plain map, then of what deq
    chooses by itself; at the same tolerance and at the same error. About seven minutes on an idle machine.

    Ratios are medians over turns; of what deq chooses with 2 threads, those of the shortest calls. 1 thread is timed by
    processor time, 2 by the clock: the machine should be idle. The file is written as cases finish; Ctrl-C keeps it.
    """
    from . import report
    from .goals import PASSES
    from .run import Run, Selection

    _need_compiled()
    passes = (which,) if which else PASSES
    try:
        run = Run(Selection(shapes, families, passes, threads or _default_threads(), seconds), out)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    if not len(run):
        raise click.UsageError("no case has this shape and family; --case with a new shape makes one")
    need_folder(out)
    _follow(run, out, report.tables)


@bench.command()
@shapes_option
@families_option
@pass_option
@click.option("--seconds", type=Seconds(), default=1.0, show_default=True, help="Per case and pass.")
@click.option("--budget", type=click.FloatRange(min=0), help="Seconds in which to end, the most valuable cases first.")
@click.option("--resume", is_flag=True, help="Go on with a file of the same commit.")
@out_option
def gpu(
    shapes: tuple[tuple[int, int], ...],
    families: tuple[str, ...],
    which: str | None,
    seconds: float,
    budget: float | None,
    resume: bool,
    out: Path,
) -> None:
    """Whole solves on the GPU as ratios over baselines that run in turns with deq: a loop in a captured CUDA graph, the
    eager and the compiled loop, torchdeq, bare products; errors against float64; shares of the measured ceilings.

    The file is written as cases finish; Ctrl-C keeps it, and --resume goes on.
    """
    from . import report
    from .goals import PASSES
    from .gpu import GpuRun
    from .run import Selection

    _need_gpu()
    need_folder(out)
    passes = (which,) if which else PASSES
    try:
        run = GpuRun(Selection(shapes, families, passes, (1,), seconds), out, "cuda", budget, resume)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    except OSError as error:
        raise cannot_write(out, error) from error
    _follow(run, out, report.gpu_tables)


@bench.command()
@click.option("--update", is_flag=True, help="Also put the numbers into deq/gpu_constants.json, which plans read.")
@out_option
def constants(update: bool, out: Path) -> None:
    """Measure the constants that plans are made from: bandwidths, products, launches. About a minute; needs a GPU."""
    from rich.console import Console
    from rich.progress import Progress

    from . import report
    from .constants import Measuring, cluster_verdict

    _need_gpu()
    need_folder(out)
    measuring = Measuring()
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(measuring))
        for done, step in enumerate(measuring.steps()):
            progress.update(task, completed=done, description=step)
    console.print(report.constants(measuring.name, measuring.numbers, measuring.failed))
    console.print(cluster_verdict(measuring.name, measuring.numbers))
    try:
        path = measuring.write(out, update)
    except OSError as error:
        raise cannot_write(out, error) from error
    console.print(f"Written to {path}", soft_wrap=True, markup=False)


@bench.command()
@click.option("--case", "shape", type=ShapeType(), help="Width and batch.  [default: 256,16384]")
@out_option
def memory(shape: tuple[int, int] | None, out: Path) -> None:
    """Peak memory of a solve and of its gradient beyond the inputs, each in a fresh process (Linux)."""
    from rich.console import Console

    from deq.profiling.memory import STATUS, can_measure

    from . import memory as run
    from . import report
    from .cases import MEMORY_CASE, Case

    _need_compiled()
    if not can_measure():
        raise click.ClickException(f"peak memory is read from Linux's {STATUS.parent}, which is not here")
    need_folder(out)
    case = MEMORY_CASE if shape is None else Case(*shape)
    console, rows = Console(), []
    with _kept(rows, report.memory, out, "memory", console), console.status("Measuring"):
        try:
            for row in run.measure(case):
                rows.append(row)
        except RuntimeError as error:
            raise click.ClickException(f"{error}") from error


@bench.command()
@click.option("--epochs", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--threads", type=COUNT, help="All that torch uses if not given.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of weights and batches.")
@out_option
def digits(epochs: int, threads: int | None, seed: int, out: Path) -> None:
    """Train a classifier of handwritten digits with deq and with torchdeq: time, accuracy, solves that failed. About a
    minute; needs scikit-learn."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from . import digits as run
    from . import report

    _need_compiled()
    if not run.has_sklearn():
        raise click.ClickException("the images come with scikit-learn: pip install scikit-learn")
    need_folder(out)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Training", total=epochs)
        rows = run.measure(
            epochs, threads or torch.get_num_threads(), seed, lambda done: progress.update(task, completed=done)
        )
    console.print(report.digits(rows))
    _finish(rows, out, "digits", console)


@bench.command()
@threads_option
@out_option
def seeds(threads: tuple[int, ...], out: Path) -> None:
    """Train 16 seeds of a small equilibrium net in one go, and one after the other in a plain torch loop."""
    from rich.console import Console

    from . import report
    from . import seeds as run

    _need_compiled()
    need_folder(out)
    console, rows = Console(), []
    with _kept(rows, report.seeds, out, "seeds", console), console.status("Training"):
        for B in run.BATCHES:
            for count in threads or _default_threads():
                rows.append(run.measure(run.Case(batch=B), count))


@bench.command()
@click.option("--width", type=click.IntRange(min=1), default=4096, show_default=True, help="Neurons of the DEQ.")
@threads_option
@out_option
def steep(width: int, threads: tuple[int, ...], out: Path) -> None:
    """A training step of the experiment steep at a large width against its matrix products alone. About two minutes."""
    from rich.console import Console

    from . import report
    from . import steep as run

    _need_compiled()
    need_folder(out)
    console, rows = Console(), []
    with _kept(rows, report.steep, out, "steep", console), console.status("Training"):
        for count in threads or _default_threads():
            rows.append(run.measure(run.Case(width), count))


@bench.command()
@threads_option
@click.option(
    "--seconds",
    type=Seconds(),
    default=2.0,
    show_default=True,
    help="Per case and method.",
)
@out_option
def peers(threads: tuple[int, ...], seconds: float, out: Path) -> None:
    """Equilibria of convolution and attention blocks against torchdeq, forward + backward. About two minutes."""
    from rich.console import Console
    from rich.progress import Progress

    from . import peers as run
    from . import report
    from .baselines import has_torchdeq

    _need_compiled()
    if not has_torchdeq():
        raise click.ClickException("torchdeq is not here: pip install torchdeq")
    need_folder(out)
    console, rows = Console(), []
    todo = list(run.steps(threads or _default_threads(), seconds))
    with _kept(rows, report.peers, out, "peers", console), Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for name, measure in todo:
            progress.update(task, description=name)
            rows += measure()
            progress.advance(task)


@bench.command()
@click.argument("base")
@click.argument("head", default="HEAD")
def compare(base: str, head: str) -> None:
    """Is HEAD slower than BASE? Builds both commits and runs them in turns; exit code 1 if any case takes longer by
    more than 5 % and three times the spread. Two minutes, half of it compiling; one thread, by processor time."""
    from rich.console import Console

    from . import compare as run
    from . import report

    console = Console()
    try:
        with console.status("Building and running"), run.built((base, head), Path.cwd()) as sites:
            verdicts = run.run(tuple(sites))
    except RuntimeError as error:
        raise click.ClickException(f"{error}") from error
    console.print(report.verdicts(verdicts))
    click.get_current_context().exit(1 if any(v.fails for v in verdicts) else 0)


@bench.command()
@click.option("--update", is_flag=True, help="Write the numbers of this build as the golden ones.")
def guard(update: bool) -> None:
    """Count instructions, evaluations, products, operators and bytes, and compare them with tests/guard.json. Exit code
    1 if anything is done more often than there. Half a minute; needs valgrind, and no quiet machine."""
    from rich.console import Console

    from . import guard as run

    console = Console()
    golden = {}
    try:
        if update:  # before anything is counted
            tempfile.TemporaryFile(dir=run.GOLDEN.parent).close()
        else:
            golden = run.read()
    except FileNotFoundError as error:
        raise click.ClickException(f"there is no {run.GOLDEN}: run this in a checkout.") from error
    except ValueError as error:  # of a merge that is not done, say
        raise click.ClickException(f"{run.GOLDEN} is no JSON: {error}.") from error
    except OSError as error:
        doing = "write" if update else "read"
        raise click.ClickException(f"cannot {doing} {run.GOLDEN}: {error.strerror or error}.") from error
    try:
        with console.status("Counting"):
            measured = run.measure()
    except RuntimeError as error:
        raise click.ClickException(f"{error}.") from error
    if update:
        try:
            run.write(measured)
        except OSError as error:
            raise click.ClickException(f"cannot write {run.GOLDEN}: {error.strerror or error}.") from error
        console.print(f"Written to {run.GOLDEN}", soft_wrap=True, markup=False)
        return
    findings = run.compare(golden, measured)
    for finding in findings:
        if finding.fails:
            click.echo(str(finding))
    failed, fewer = sum(f.fails for f in findings), sum(f.now < f.golden for f in findings)
    console.print(f"{failed} numbers rose beyond their tolerance; {fewer} fell. `deq bench guard --update` keeps them.")
    click.get_current_context().exit(1 if failed else 0)


def _follow(run, out: Path, tables: Callable) -> None:
    """Go through the steps of a run with a progress bar; then, also when stopped, print, draw and say where it is."""
    from rich.console import Console
    from rich.progress import Progress

    from deq.files import CannotWrite, writing

    from . import figure, report

    console = Console()
    interrupted = False
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=len(run))
            for done, step in enumerate(run.steps()):
                progress.update(task, completed=done, description=step)
    except KeyboardInterrupt:
        interrupted = True
    except CannotWrite as error:
        raise cannot_write(out, error) from error
    for table in tables(run.results):
        console.print(table)
    console.print(report.summary(run.results.required()))
    if run.results.auto:
        try:
            with writing():
                figure.draw(run.results.auto, run.path.with_suffix(".png"))
        except CannotWrite as error:
            raise cannot_write(out, error) from error
    if run.path:
        console.print(f"Written to {run.path}", soft_wrap=True, markup=False)
    if interrupted:
        click.echo("Interrupted: what was finished is kept.", err=True)
        click.get_current_context().exit(130)


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no device"
        raise click.ClickException(f"there is nothing to measure without a CUDA GPU: {why}")


def _need_compiled() -> None:
    from deq import _library

    if _library.compiled is None:
        raise click.ClickException(f"there is nothing to measure without the compiled library: {_library.reason}")


def _default_threads() -> tuple[int, ...]:
    import torch

    return (1, 2) if torch.get_num_threads() > 1 else (1,)


@contextmanager
def _kept(rows: list[dict], table: Callable, out: Path, name: str, console) -> Iterator[None]:
    """What is done inside fills ``rows``; they are printed and written, also where Ctrl-C or an error ends it."""
    ended = None
    try:
        yield
    except (KeyboardInterrupt, RuntimeError, click.ClickException) as error:
        ended = error
    if rows:
        console.print(table(rows))
        _finish(rows, out, name, console)
    if isinstance(ended, KeyboardInterrupt):
        click.echo(f"Interrupted: {'what was finished is kept' if rows else 'nothing was finished'}.", err=True)
        click.get_current_context().exit(130)
    if ended is not None:
        raise ended


def _finish(rows: list[dict], out: Path, name: str, console) -> None:
    from . import report
    from .record import environment

    where = environment()
    path = save([row | where for row in rows], out, name)
    console.print(report.summary(rows))
    console.print(f"Written to {path}", soft_wrap=True, markup=False)
