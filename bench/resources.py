"""What the compiler makes of every GPU kernel: registers, stack, shared memory and tensor-core instruction.

Kernels are compiled ahead of time and compared with ``tests/resources.json``: on machines without a GPU this is the
guard of speed, where a spill or a lost wgmma shows. Triton kernels list their variants in their own files, in groups of
nearly the same code, of which the file holds one each; CUDA kernels are read from libdeq.so. ``python -m
bench.resources --write`` replaces the file, ``--all`` compiles every variant and holds it against the budgets.
"""

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from zlib import crc32

import click
import triton

from deq import _library
from deq.kernels.compilation import Compilation

from .compile import compile_all, read_instructions, read_usage

# Files of deq.kernels that list their compilations.
MODULES = ("cell", "iteration", "mixing", "delta", "ends", "solve_resident", "diagonal", "triangular", "history")
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "resources.json"
# Registers and stack bytes per thread, shared bytes per block. A stack is a spill; for sm_100 Triton leaves a few bytes
# of it in one kernel or the other.
BUDGETS = {
    "sm_80": {"registers": 255, "stack": 0, "shared": 163 * 1024},
    "sm_90": {"registers": 255, "stack": 0, "shared": 227 * 1024},
    "sm_100": {"registers": 255, "stack": 16, "shared": 227 * 1024},
}
# Stacks that are let be, by the beginning of a kernel's name: a resident program that holds a W of 256 has no register
# to spare, and with Anderson's equations spills values into L1 once an iteration, 128 to 168 bytes a thread with Triton
# 3.9 (8 to 24 without), 336 to 384 with 3.6 (40), which also spills 24 to 48 at 64. Large steps are faster with a spill
# where samples are judged than with tiles that do without (kernels/tiles.py has the times). nvcc keeps small frames
# that are no spills, which would fail the build of the C++ tests.
STACKS = {
    "step, 1 split, 128x64x32": 432,
    "step, accelerated, 1 split, 128x64x32": 600,
    "step, 1 split, 64x32x64": 216,
    "step, accelerated, 1 split, 64x32x64": 208,
    "anchor, bfloat16, accelerated, 1 split, 128x64x32": 1408,
    "anchor, float8, accelerated, 1 split, 128x64x32": 1224,
    "anchor, bfloat16, accelerated, 1 split, 64x32x64": 232,
    "anchor, float8, accelerated, 1 split, 64x32x64": 208,
    "delta step, float8, 128x64x128": 1288,  # 952 with Triton 3.9, 1288 with 3.7
    "delta step, float8, 64x32x128": 40,
    "resident solve, accelerated, native, 64x16": 48,
    "resident solve, accelerated, bfloat16, 256x16": 384,
    "resident solve, bfloat16, 256x16": 40,
    "cuda": 64,
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
    return [(v, name) for name in architectures() for v in compilations(modules) if v.runs_on(name)]


def guarded(modules: Iterable[str] = MODULES) -> list[tuple[Compilation, str]]:
    """What the file holds: of every group that a plan can choose one variant for sm_90, and for the other architectures
    of one group in four; drawn by name, so that all kinds of variants come up."""
    groups: dict[str, list[Compilation]] = {}
    for variant in compilations(modules):
        if variant.chosen:
            groups.setdefault(variant.group, []).append(variant)
    return [
        (group[_draw(f"{name} {architecture}", len(group))], architecture)
        for architecture in architectures()
        for name, group in groups.items()
        if group[0].runs_on(architecture)
        if architecture == "sm_90" or _draw(f"{name} in {architecture}", 4) == 0
    ]


def _draw(name: str, count: int) -> int:
    """A number below ``count`` that stays the same when other names come and go."""
    return crc32(name.encode()) % count


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
    if not names:  # of a library without CUDA kernels, which needs no compiler to have been here
        return {}
    done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    spaces = "void ", "deq::", "(anonymous namespace)::"
    readable = (reduce(lambda line, space: line.replace(space, ""), spaces, line) for line in done.stdout.splitlines())
    return dict(zip(names, readable, strict=True))


def read_golden() -> dict:
    """The committed resources: ``{"triton": version, "nvcc": version, "resources": [record, ...]}``."""
    return json.loads(GOLDEN.read_text())


def write_golden(records: Sequence[dict], golden: dict | None = None) -> None:
    """Replace the committed resources of the kernels that the records are of, one record a line so that a change reads
    as one; those of other kernels stay as in ``golden``."""
    kernels = {_kernel(record) for record in records}
    kept = [record for record in golden["resources"] if _kernel(record) not in kernels] if golden else []
    ordered = sorted([*kept, *records], key=lambda record: (record["kernel"], record["architecture"]))
    lines = ",\n".join(f"    {json.dumps(record)}" for record in ordered)
    here = {"triton": triton.__version__, "nvcc": nvcc_version()}
    if golden:  # who compiled what is kept
        here |= {
            name: golden[name]
            for name, own in (("triton", kernels - {"cuda"}), ("nvcc", kernels & {"cuda"}))
            if not own
        }
    versions = "".join(f"  {json.dumps(name)}: {json.dumps(version)},\n" for name, version in here.items())
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
        over = over_budget(record)
        wrong += over
        if same:
            wrong += [
                f"{name}: {key} {record[key]}, was {before[key]}"
                for key in KEYS[:3]
                if record[key] > before[key] and not any(f": {key} " in sentence for sentence in over)
            ]
        unit, expected = (entry["instruction"].split(".")[0] for entry in (record, before))
        if unit != expected and (same or expected in ("wgmma", "HGMMA")):
            wrong.append(f"{name}: multiplies by {unit}, was {expected}")
    return wrong


def over_budget(record: dict) -> list[str]:
    """What a record has more of than its architecture allows, one sentence each."""
    name, limits = f"{record['kernel']}, {record['architecture']}", dict(BUDGETS[record["architecture"].rstrip("af")])
    limits["stack"] = max([limits["stack"], *(most for start, most in STACKS.items() if name.startswith(start))])
    return [f"{name}: {key} {record[key]}, allowed {most}" for key, most in limits.items() if record[key] > most]


@click.command()
@click.option("--write", is_flag=True, help=f"Replace these kernels in tests/{GOLDEN.name}.")
@click.option(
    "--kernel",
    "modules",
    type=click.Choice([*MODULES, "cuda"]),
    metavar="FILE",
    multiple=True,
    help=f"Only those of {', '.join(MODULES)} or cuda; repeatable.",
)
@click.option("--all", "whole", is_flag=True, help="Every variant, within the budgets; a quarter of an hour.")
def main(write: bool, modules: tuple[str, ...], whole: bool) -> None:
    """Compile the GPU kernels; compare registers, stack, shared memory and instruction with what is committed."""
    from rich.console import Console
    from rich.progress import track

    if not write and not GOLDEN.exists():
        raise click.ClickException(f"{GOLDEN} is not there to compare with: this command needs a checkout.")
    console = Console()
    wanted = modules or (*MODULES, "cuda")
    if "cuda" in wanted and _library.build.get("cuda") and shutil.which("c++filt") is None:
        raise click.ClickException(
            "c++filt is not here, which tells the names of the library's CUDA kernels: install binutils, or leave them "
            f"out with {' '.join(f'--kernel {name}' for name in wanted if name != 'cuda')}".rstrip()
        )
    jobs = (everything if whole else guarded)([module for module in wanted if module != "cuda"])
    records = list(track(compile_all(jobs), "compiling", total=len(jobs), console=console, transient=True))
    if "cuda" in wanted and _library.path is not None:
        records += of_library(_library.path)
    console.print(_table(records))
    if write:
        golden = read_golden() if GOLDEN.exists() else None
        held = {(variant.name, architecture) for variant, architecture in guarded()}
        kept = [r for r in records if (r["kernel"], r["architecture"]) in held or _kernel(r) == "cuda"]
        write_golden([record for record in kept if "error" not in record], golden)
    committed = read_golden()
    listed = {(entry["kernel"], entry["architecture"]) for entry in committed["resources"]}
    wrong = []
    for record in records:
        if whole and (record["kernel"], record["architecture"]) not in listed and "error" not in record:
            wrong += over_budget(record)
        else:
            wrong += faults([record], committed)
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
