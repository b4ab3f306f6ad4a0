"""``python -m bench.ncu``: the roofline of every GPU kernel as numbers, measured by NVIDIA's ncu.

ncu runs this file again with ``--launch``, which solves each case once. Of all launches of a kernel with one grid the
longest is kept: its time, its rates of float32 and memory beside their peaks, and the busiest units' shares. Written to
``ncu.json`` in the folder of the device. Counters may be for administrators only; ncu then says so.
"""

import csv
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from .options import need_folder, out_option, save
from .record import environment

SECTIONS = ("SpeedOfLight", "SpeedOfLight_RooflineChart")
# m, B and backend of a solve with its gradient: the regimes of deq/gpu_plan.py.
CASES = (
    (256, 1024, "cuda"),
    (300, 64, "cuda"),
    (2048, 1, "cuda"),
    (2048, 32, "cuda"),
    (4096, 8, "cuda"),
    (64, 4096, "triton"),
    (1024, 256, "triton"),
    (4096, 4096, "triton"),
)
TRIANGULAR = ((1024, 8), (1024, 4096))  # m, B of a substitution
LAUNCHES = 400  # that are looked at, at most
# Metrics of ncu, by what a row calls them. Throughputs are percentages of the peak.
SHARES = {
    "compute_share": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_share": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_share": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_share": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_share": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
}
SECONDS = "gpu__time_duration.sum"
OPERATION = "smsp__sass_thread_inst_executed_op_{}_pred_on.sum.per_cycle_elapsed"
OPERATIONS = {"fadd": 1, "fmul": 1, "ffma": 2}  # FLOP each
OPERATION_CLOCK = "smsp__cycles_elapsed.avg.per_second"
FFMA_PEAK = "sm__sass_thread_inst_executed_op_ffma_pred_on.sum.peak_sustained"
FFMA_CLOCK = "sm__cycles_elapsed.avg.per_second"
DRAM_RATE, DRAM_PEAK = "dram__bytes.sum.per_second", "dram__bytes.sum.peak_sustained"
DRAM_CLOCK = "dram__cycles_elapsed.avg.per_second"
TO_SECONDS = {
    "nsecond": 1e-9,
    "ns": 1e-9,
    "usecond": 1e-6,
    "us": 1e-6,
    "msecond": 1e-3,
    "ms": 1e-3,
    "second": 1.0,
    "s": 1.0,
}


def find_ncu() -> str | None:
    """The ncu on the path or of a CUDA toolkit in its usual place."""
    return shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")


def command(ncu: str, python: Sequence[str] = (sys.executable,)) -> list[str]:
    """What is run: every launch of :func:`launch`, in CSV and base units on its standard output."""
    sections = [part for name in SECTIONS for part in ("--section", name)]
    how = [
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--launch-count",
        str(LAUNCHES),
        "--target-processes",
        "all",
    ]
    return [ncu, *how, *sections, *python, "-m", "bench.ncu", "--launch"]


def read(output: str) -> list[dict]:
    """One row a kernel and grid from what ncu printed: kernel, grid, block, launches, seconds, shares of the peaks
    (0 to 1), float32 FLOP/s and memory bytes/s with their peaks. What ncu has not measured is None.

    Raises ValueError where there is no table in it.
    """
    table = [line for line in output.splitlines() if line.startswith('"')]
    if len(table) < 3:
        raise ValueError("ncu printed no table of kernels")
    names, units, *launches = csv.reader(table)
    unit = dict(zip(names, units, strict=True))
    rows: dict[tuple[str, str, str], dict] = {}
    for values in launches:
        launch = dict(zip(names, values, strict=True))
        place = tuple(launch[name] for name in ("Kernel Name", "Grid Size", "Block Size"))
        row = dict(zip(("kernel", "grid", "block"), place, strict=True)) | _measured(launch, unit)
        known = rows.get(place)
        row["launches"] = 1 if known is None else known["launches"] + 1
        if known is not None and (known["seconds"] or 0) > (row["seconds"] or 0):
            row = known | {"launches": row["launches"]}
        rows[place] = row
    return list(rows.values())


def _measured(launch: dict[str, str], unit: dict[str, str]) -> dict[str, float | None]:
    def number(name: str) -> float | None:
        try:
            value = float(launch[name].replace(",", ""))
        except (KeyError, ValueError):  # not collected, or "n/a"
            return None
        return value if math.isfinite(value) else None

    def product(*factors: float | None) -> float | None:
        return None if None in factors else math.prod(factors)

    operations = [product(number(OPERATION.format(name)), flops) for name, flops in OPERATIONS.items()]
    per_cycle = None if None in operations else sum(operations)
    seconds = product(number(SECONDS), TO_SECONDS.get(unit.get(SECONDS, "")))
    return {
        "seconds": seconds,
        **{name: product(number(metric), 0.01) for name, metric in SHARES.items()},
        "float32_flops": product(per_cycle, number(OPERATION_CLOCK)),
        "float32_peak": product(2.0, number(FFMA_PEAK), number(FFMA_CLOCK)),
        "dram_bytes": number(DRAM_RATE),
        "dram_peak": product(number(DRAM_PEAK), number(DRAM_CLOCK)),
    }


def launch() -> None:
    """Solve every case and differentiate it, once."""
    import torch

    import deq

    def run(W: object, m: int, B: int, **options: str) -> None:
        c = torch.randn(B, m, device="cuda", requires_grad=True)
        deq.solve(W, c, "tanh", **options).z.sum().backward()

    torch.manual_seed(0)
    usable = {name for name, why in deq.info().backends.items() if not why}
    for m, B, backend in CASES:
        if backend in usable:
            run((0.5 / m**0.5 * torch.randn(m, m, device="cuda")).requires_grad_(), m, B, backend=backend)
    for m, B in TRIANGULAR:
        W = 0.5 / m**0.5 * torch.randn(m, m, device="cuda")
        run(deq.weights.LowerTriangular(W.requires_grad_()), m, B, solver="direct")
    m = 300  # whose plain iteration does not contract: what is left goes to Newton's method
    run(3 / m**0.5 * torch.randn(m, m, device="cuda"), m, 8, on_failure="ignore")
    torch.cuda.synchronize()


def measure(ncu: str, python: Sequence[str] = (sys.executable,)) -> Iterator[dict]:
    """The rows of :func:`read`. Raises RuntimeError with the end of what ncu said where it failed."""
    done = subprocess.run(command(ncu, python), capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    try:
        if done.returncode:
            raise ValueError(f"ncu ended with code {done.returncode}")
        yield from read(done.stdout)
    except ValueError as error:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise RuntimeError(f"{error}:\n{said}") from error


@click.command()
@click.option("--launch", "launches", is_flag=True, help="Only solve the cases, for ncu to look on.")
@out_option
def main(launches: bool, out: Path) -> None:
    """Roofline numbers of every GPU kernel, by ncu."""
    if launches:
        return launch()
    ncu = find_ncu()
    if ncu is None:
        raise click.ClickException("ncu (NVIDIA Nsight Compute) is neither on the path nor in /usr/local/cuda/bin")
    need_folder(out)
    where = environment("cuda")
    try:
        rows = [row | where for row in measure(ncu)]
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    for row in sorted(rows, key=lambda row: -(row["seconds"] or 0)):
        shares = ", ".join(
            f"{name.removesuffix('_share')} {100 * row[name]:.0f} %" for name in SHARES if row[name] is not None
        )
        click.echo(f"{1e6 * (row['seconds'] or 0):9.1f} us  {row['kernel'][:48]:<48}  {shares}")
    click.echo(f"Written to {save(rows, out, 'ncu', 'cuda')}")


if __name__ == "__main__":
    main()
