"""``python -m bench.on_gpu``: all that a machine with a GPU is needed for, by value, within a time.

Builds the library for this GPU, runs the tests of the GPU engines on it, the small cases under compute-sanitizer, then
measures the constants of plans, the benchmark and, where ncu is installed, every kernel's roofline. Every step has its
own limit and keeps what it has written; what it printed goes into on_gpu.json beside the results. One step or several
can be run alone; the benchmark goes on where it was stopped.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import click

from .options import cannot_write, need_folder, out_option

ROOT = Path(__file__).resolve().parents[1]
TAIL = 6000  # characters of a step's output that are kept
GRACE = 10.0  # seconds between an interrupt and the end
LEAST = 5.0  # seconds for which a step is still begun


@dataclass(frozen=True)
class Step:
    """A command in the root of the checkout; ``limit`` in seconds. ``{left}`` in it becomes the seconds that it has."""

    name: str
    limit: float
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def plan(capability: tuple[int, int], out: Path) -> tuple[Step, ...]:
    """The steps, most valuable first, for a GPU of this compute capability."""
    number = f"{capability[0]}{capability[1]}"
    target = f"{number}{'a' if capability >= (9, 0) else ''}-real"
    python = sys.executable
    install = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
    compiled = {"TRITON_INTERPRET": "0"}  # tests/conftest.py turns Triton's interpreter on where nothing is said
    deq = (python, "-m", "deq.cli", "bench")
    small = (python, "-m", "bench.small_cases")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    files = ("tests/test_on_gpu.py", "tests/test_triton_gpu.py", "tests/test_cuda.py")
    # Sanitizers have steps of their own, all but synccheck (tests/test_cuda.py says why); warnings of another torch are
    # no errors here. A test compiles its kernels, two to four seconds each: with pytest-xdist, a process a core does.
    workers = ("-n", str(os.cpu_count() or 1)) if find_spec("xdist") else ()
    tests = (python, "-m", "pytest", "-q", "-W", "default", "-k", "not sanitizers", *workers, *files)
    return (
        Step("build", 100, (*install, "--config-settings", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={target}")),
        Step("small", 100, small, compiled),  # also compiles what the sanitizer would wait for
        Step("tests", 130, tests, compiled | ({"OMP_NUM_THREADS": "1"} if workers else {})),
        Step("memcheck", 60, (*sanitizer, "memcheck", *small), compiled),
        Step("racecheck", 40, (*sanitizer, "racecheck", *small), compiled),
        Step("constants", 40, (*deq, "constants", "--out", str(out))),
        Step("bench", 3600, (*deq, "gpu", "--resume", "--budget", "{left}", "--out", str(out))),
        Step("regimes", 150, (python, "-m", "bench.regimes", "--out", str(out)), compiled),
        Step("ncu", 240, (python, "-m", "bench.ncu", "--out", str(out)), compiled),
        Step("initcheck", 60, (*sanitizer, "initcheck", *small), compiled),
    )


def run(step: Step, seconds: float) -> dict:
    """Run a step for at most so many seconds: step, command, seconds, code (None where it ran out of time) and the tail
    of its output, which is also shown as it comes."""
    command = [part.replace("{left}", f"{max(1.0, 0.9 * seconds):.0f}") for part in step.command]
    record = {"step": step.name, "command": command}
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | step.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_hears_interrupts,
        )
    except OSError as error:
        return record | {"seconds": 0.0, "code": error.errno, "output": f"{command[0]}: {error.strerror}"}
    # The process and its children are interrupted, as by Ctrl-C, when the time is over, and killed soon after.
    sent: list[int] = []
    timers = [
        threading.Timer(after, lambda number=number: (sent.append(number), os.killpg(process.pid, number)))
        for after, number in ((seconds, signal.SIGINT), (seconds + GRACE, signal.SIGKILL))
    ]
    output = []
    try:
        for timer in timers:
            timer.start()
        for line in process.stdout:
            click.echo(line, nl=False)
            output.append(line)
        code = process.wait()
    finally:  # also of a Ctrl-C here
        for timer in timers:
            timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        process.stdout.close()
    seconds = round(time.monotonic() - start, 1)
    return record | {"seconds": seconds, "code": None if sent else code, "output": "".join(output)[-TAIL:]}


def _hears_interrupts() -> None:
    """In a step, before it begins: a job in the background of a script ignores Ctrl-C, and what it starts would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_all(steps: Sequence[Step], seconds: float, keep: Callable[[list[dict]], object]) -> list[dict]:
    """Run the steps one after the other within so many seconds in all; ``keep`` is given the records after each."""
    end = time.monotonic() + seconds
    records: list[dict] = []
    for step in steps:
        left = min(step.limit, end - time.monotonic())
        click.secho(f"\n==== {step.name}, at most {max(0.0, left):.0f} s", bold=True)
        if left < LEAST:
            records.append({"step": step.name, "command": list(step.command), "seconds": 0.0, "code": None})
            records[-1]["output"] = "not begun: no time was left"
        else:
            records.append(run(step, left))
        keep(records)
    return records


def verdict(record: dict) -> str:
    code = {0: "passed", None: "out of time"}.get(record["code"], f"failed ({record['code']})")
    return f"{record['step']:<12}{record['seconds']:>7.0f} s  {code}"


NAMES = tuple(step.name for step in plan((9, 0), Path()))


@click.command()
@click.option(
    "--step",
    "names",
    type=click.Choice(NAMES),
    metavar="STEP",
    multiple=True,
    help=f"Only this step, of {', '.join(NAMES)}; repeatable.",
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=9.5, show_default=True, help="In all.")
@out_option
def main(names: tuple[str, ...], minutes: float, out: Path) -> None:
    """Build, test, sanitize, measure: all that needs a GPU, the most valuable first."""
    import torch

    from deq.bench.record import environment, folder
    from deq.files import CannotWrite

    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA GPU here")
    need_folder(out)
    steps = [
        step for step in plan(torch.cuda.get_device_capability(), out.resolve()) if not names or step.name in names
    ]
    try:
        where, path = environment("cuda"), folder(out, "cuda") / "on_gpu.json"
        records = run_all(steps, 60 * minutes, lambda records: write(path, records, where))
    except CannotWrite as error:
        raise cannot_write(out, error) from error
    click.echo("\n" + "\n".join(verdict(record) for record in records))
    click.echo(f"Written to {path}")
    if any(record["code"] != 0 for record in records):
        raise SystemExit(1)


def write(path: Path, records: Sequence[dict], where: dict) -> None:
    """Write the records, beside those of other steps that the file holds of the same commit."""
    from deq.bench.record import write_rows

    known = json.loads(path.read_text()) if path.exists() else []
    new = {record["step"]: record | where for record in records}
    merged = {record["step"]: record for record in known if record["commit"] == where["commit"]} | new
    write_rows(path, [merged[name] for name in dict.fromkeys((*NAMES, *merged)) if name in merged])


if __name__ == "__main__":
    main()
