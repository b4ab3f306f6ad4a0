"""What the compiler makes of every GPU kernel: registers, stack, shared memory and tensor-core instruction.

``python -m bench.resources`` compiles all that can be launched, ahead of time and without a GPU, and compares with
``tests/resources.json``; ``--write`` replaces it there. On machines without a GPU this is the guard of speed: a spill
or a lost wgmma shows here. Triton kernels list their variants in their own files, CUDA kernels are read from libdeq.so.
"""

import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import click
import triton

from deq import _library
from deq.kernels.compilation import Compilation

from .compile import compile_all, read_instructions, read_usage

MODULES = ("cell", "iteration", "solve_resident")  # files of deq.kernels that list their compilations
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "resources.json"
# Registers and stack bytes per thread, shared bytes per block. A stack is a spill; for sm_100 Triton leaves a few bytes
# of it in one kernel or the other.
BUDGETS = {
    "sm_80": {"registers": 255, "stack": 0, "shared": 163 * 1024},
    "sm_90": {"registers": 255, "stack": 0, "shared": 227 * 1024},
    "sm_100": {"registers": 255, "stack": 16, "shared": 227 * 1024},
}
KEYS = ("registers", "stack", "shared", "instruction")


def architectures() -> tuple[str, ...]:
    """Those that this Triton compiles for: 3.6 aborts on most kernels for sm_100."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return tuple(name for name in BUDGETS if name != "sm_100" or (major, minor) >= (3, 7))


def compilations(modules: Iterable[str] = MODULES) -> list[Compilation]:
    """All variants of the Triton kernels in these files."""
    return [variant for module in modules for variant in import_module(f"deq.kernels.{module}").compilations()]


def everything(modules: Iterable[str] = MODULES) -> list[tuple[Compilation, str]]:
    """Every variant for every architecture."""
    return [(variant, name) for name in architectures() for variant in compilations(modules)]


def one_of_each_group(modules: Iterable[str] = MODULES) -> list[tuple[Compilation, str]]:
    """For every architecture one variant of each group that a plan can choose, another kind from group to group: what a
    test has time for."""
    jobs = []
    for name in architectures():
        groups: dict[str, list[Compilation]] = {}
        for variant in compilations(modules):
            if variant.chosen:
                groups.setdefault(variant.group, []).append(variant)
        jobs += [(group[place % len(group)], name) for place, group in enumerate(groups.values())]
    return jobs


def of_library(library: Path) -> list[dict]:
    """Records of the CUDA kernels in a compiled library, none if it has none. Shared bytes are the static ones."""
    usage, instructions = read_usage(library), read_instructions(library)
    names = _demangled([name for name, _ in usage])
    return [
        {"kernel": f"cuda, {names[name]}", "architecture": architecture, **values}
        | {"instruction": instructions.get((name, architecture), "fma")}
        for (name, architecture), values in usage.items()
    ]


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """``tile<256>`` for ``_Z4tileILi256EEvPf``; c++filt comes with the compiler that built the library."""
    names = list(dict.fromkeys(names))
    done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: line.removeprefix("void ") for name, line in zip(names, done.stdout.splitlines(), strict=True)}


def read_golden() -> dict:
    """The committed resources: ``{"triton": version, "nvcc": version, "resources": [record, ...]}``."""
    return json.loads(GOLDEN.read_text())


def write_golden(records: Sequence[dict], golden: dict | None = None) -> None:
    """Replace the committed resources of the kernels that the records are of, one record a line so that a change reads
    as one; those of other kernels stay as in ``golden``."""
    kernels = {_kernel(record) for record in records}
    kept = [record for record in golden["resources"] if _kernel(record) not in kernels] if golden else []
    ordered = sorted([*kept, *records], key=lambda record: _kernel(record) == "cuda")
    lines = ",\n".join(f"    {json.dumps(record)}" for record in ordered)
    versions = f'  "triton": {json.dumps(triton.__version__)},\n  "nvcc": {json.dumps(nvcc_version())},\n'
    GOLDEN.write_text(f'{{\n{versions}  "resources": [\n{lines}\n  ]\n}}\n')


def _kernel(record: dict) -> str:
    return record["kernel"].split(",")[0]


def nvcc_version() -> str | None:
    """Of the compiler that built the CUDA kernels of the loaded library; None without such."""
    return _library.build.get("nvcc") or None


def faults(records: Iterable[dict], golden: dict) -> list[str]:
    """What is wrong with the records, one sentence each. Any compiler: does not compile, over a budget, wgmma lost. The
    compiler that ``golden`` was made with: more of anything than there, or another instruction."""
    known = {(entry["kernel"], entry["architecture"]): entry for entry in golden["resources"]}
    wrong = []
    for record in records:
        name = f"{record['kernel']}, {record['architecture']}"
        if "error" in record:
            wrong.append(f"{name}: does not compile: {record['error']}")
            continue
        before = known.get((record["kernel"], record["architecture"]))
        if before is None:
            wrong.append(f"{name}: not in {GOLDEN.name}")
            continue
        same = golden["nvcc"] == nvcc_version() if _kernel(record) == "cuda" else golden["triton"] == triton.__version__
        for key, limit in BUDGETS[re.sub(r"[a-z]$", "", record["architecture"])].items():
            if record[key] > limit:
                wrong.append(f"{name}: {key} {record[key]}, allowed {limit}")
            elif same and record[key] > before[key]:
                wrong.append(f"{name}: {key} {record[key]}, was {before[key]}")
        unit, expected = (entry["instruction"].split(".")[0] for entry in (record, before))
        if unit != expected and (same or expected in ("wgmma", "HGMMA")):
            wrong.append(f"{name}: multiplies by {unit}, was {expected}")
    return wrong


@click.command()
@click.option("--write", is_flag=True, help=f"Replace these kernels in tests/{GOLDEN.name}.")
@click.option(
    "--kernel", "modules", type=click.Choice([*MODULES, "cuda"]), multiple=True, help="Only these; repeatable."
)
def main(write: bool, modules: tuple[str, ...]) -> None:
    """Compile every variant of every kernel; compare registers, stack, shared memory and instruction."""
    from rich.console import Console
    from rich.progress import track

    if not write and not GOLDEN.exists():
        raise click.ClickException(f"{GOLDEN} is not there to compare with: this command needs a checkout.")
    console = Console()
    wanted = modules or (*MODULES, "cuda")
    jobs = everything(module for module in wanted if module != "cuda")
    records = list(track(compile_all(jobs), "compiling", total=len(jobs), console=console, transient=True))
    if "cuda" in wanted and _library.path is not None:
        records += of_library(_library.path)
    console.print(_table(records))
    if write:
        golden = read_golden() if GOLDEN.exists() else None
        write_golden([record for record in records if "error" not in record], golden)
    wrong = faults(records, read_golden())
    for sentence in wrong:
        console.print(sentence, markup=False)
    if wrong:
        raise SystemExit(1)


def _table(records: Iterable[dict]):
    """The largest of each kernel and architecture."""
    from rich.table import Table

    table = Table(title=f"Largest of all variants, Triton {triton.__version__}", box=None, pad_edge=False)
    for column in ("kernel", "architecture", "variants", *KEYS):
        table.add_column(column, justify="left" if column in ("kernel", "architecture", "instruction") else "right")
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        if "error" not in record:
            groups.setdefault((_kernel(record), record["architecture"]), []).append(record)
    for (kernel, architecture), group in groups.items():
        largest = [str(max(record[key] for record in group)) for key in KEYS[:3]]
        instructions = sorted({record["instruction"].split(".")[0] for record in group})
        table.add_row(kernel, architecture, str(len(group)), *largest, ", ".join(instructions))
    return table


if __name__ == "__main__":
    main()
