"""What the compiler makes of every kernel: registers, stack, shared memory and tensor-core instruction, without a GPU.

``python -m bench.resources`` compiles all variants that can be chosen at run time, ahead of time, and compares with
``tests/resources.json``; ``--write`` replaces that file. On machines without a GPU this is the guard of speed: a spill
or a lost wgmma shows here. Kernels are compiled in processes of their own, because an interpreted kernel cannot be
compiled and because the compiler may abort.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import deq
from deq.activations import ACTIVATIONS
from deq.kernels import cell

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "resources.json"
# Registers and stack bytes per thread, shared bytes per block. A stack is a spill; for sm_100 Triton 3.6 leaves a few
# bytes of it in one kernel or the other.
BUDGETS = {
    "sm_80": {"registers": 255, "stack": 0, "shared": 163 * 1024},
    "sm_90": {"registers": 255, "stack": 0, "shared": 227 * 1024},
    "sm_100": {"registers": 255, "stack": 16, "shared": 227 * 1024},
}
TYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
# Ending, activation (one for each kind of arithmetic: comparison, exponential with a series, error function), the
# direction in which W is contiguous (the adjoint's A is a transposed W), and whether the width is a multiple of 16.
KINDS = (
    ("value", "relu", "rows", "aligned"),
    ("value", "tanh", "rows", "aligned"),
    ("value", "tanh", "rows", "ragged"),
    ("value", "tanh", "columns", "aligned"),
    ("value", "gelu", "rows", "aligned"),
    ("derivative", "gelu", "rows", "aligned"),
    ("adjoint", "identity", "columns", "aligned"),
    ("adjoint", "identity", "columns", "ragged"),
    ("adjoint", "identity", "rows", "aligned"),
)


@dataclass(frozen=True)
class Variant:
    """One compilation of the cell; the fields after ``tiles`` as in KINDS."""

    dtype: str
    precision: str
    tiles: cell.Tiles
    ending: str
    activation: str
    weight: str
    width: str
    architecture: str

    @property
    def kernel(self) -> str:
        """The name under which the resources are listed."""
        t = self.tiles
        ending = self.ending if self.ending == "adjoint" else f"{self.ending} of {self.activation}"
        dtype = self.dtype if self.precision == "ieee" else f"{self.dtype} as {self.precision}"
        return f"cell {ending}, W by {self.weight}, {self.width}, {dtype}, {t.samples}x{t.units}x{t.depth}"


def variants(architectures: Iterable[str] = BUDGETS) -> list[Variant]:
    """Everything that :func:`deq.kernels.cell.cell_tiles` can choose, in every kind."""
    return [
        Variant(dtype, precision, tiles, *kind, architecture)
        for architecture in architectures
        for dtype in cell.DTYPES
        for precision in (cell.PRECISIONS if dtype == "float32" else cell.PRECISIONS[:1])
        for tiles in cell.TILES[dtype if precision == "ieee" else "tf32"]
        for kind in KINDS
        if kind[-1] == "aligned" or tiles.samples <= cell.RAGGED_SAMPLES
    ]


def measure(chosen: list[Variant]) -> Iterator[dict]:
    """Compile the variants and yield one record each, in order: kernel, architecture, registers and stack bytes per
    thread, shared bytes per block, instruction; or kernel, architecture and error where the compiler refused."""
    workers = min(os.cpu_count() or 1, len(chosen), 8)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        size = max(1, min(32, -(-len(chosen) // max(1, workers))))
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        for records in pool.map(_measure_apart, parts):
            yield from records


def _measure_apart(chosen: list[Variant]) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    records: list[dict] = []
    while len(records) < len(chosen):
        left = chosen[len(records) :]
        done = subprocess.run(
            [sys.executable, "-c", "from deq.bench.resources import _work; _work()"],
            input=json.dumps([asdict(variant) for variant in left]),
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(deq.__file__).parents[1],
        )
        records += [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode != 0:  # one that the compiler aborts on is recorded, and the rest gets a new process
            failed = chosen[len(records)]
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            records.append({"kernel": failed.kernel, "architecture": failed.architecture, "error": reason})
    return records


def _work() -> None:
    for entry in json.load(sys.stdin):
        variant = Variant(**{**entry, "tiles": cell.Tiles(**entry["tiles"])})
        record = {"kernel": variant.kernel, "architecture": variant.architecture, **_compile(variant)}
        print(json.dumps(record), flush=True)


def _compile(variant: Variant) -> dict:
    tiles = variant.tiles
    epilogue = {"value": cell.VALUE, "derivative": cell.DERIVATIVE, "adjoint": cell.ADJOINT}[variant.ending].value
    constants = {
        "EPILOGUE": epilogue,
        "ACTIVATION": ACTIVATIONS[variant.activation].number,
        "PRECISION": variant.precision,
        "BLOCK_B": tiles.samples,
        "BLOCK_N": tiles.units,
        "BLOCK_K": tiles.depth,
    }
    if variant.ending != "adjoint":
        constants["d_ptr"] = None
    constants["stride_wk" if variant.weight == "rows" else "stride_wn"] = 1  # compiled in, as at run time
    names = cell.cell_kernel.arg_names
    sums = "*fp64" if variant.dtype == "float64" else "*fp32"
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("2_ptr"):
            signature[name] = sums
        else:
            signature[name] = f"*{TYPES[variant.dtype]}" if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or (variant.width == "aligned" and name != "B"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(cell.cell_kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", int(variant.architecture.removeprefix("sm_")), 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True},
    )
    usage = _usage(kernel.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": kernel.metadata.shared,
        "instruction": _instruction(kernel.asm["ptx"]),
    }


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def _instruction(ptx: str) -> str:
    """The instruction that multiplies: that of the tensor cores if there is one."""
    found = re.findall(r"\b(wgmma\.mma_async\.[\w.]+|mma\.sync\.[\w.]+|tcgen05\.mma\.[\w.:]+)", ptx)
    return " + ".join(sorted(set(found))) or "fma"


def read_golden() -> dict:
    """The committed resources: ``{"triton": version, "resources": [record, ...]}``."""
    return json.loads(GOLDEN.read_text())


def write_golden(records: list[dict]) -> None:
    """Replace the committed resources, one record a line so that a change reads as one."""
    lines = ",\n".join(f"    {json.dumps(record)}" for record in records)
    GOLDEN.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "resources": [\n{lines}\n  ]\n}}\n')


def faults(records: list[dict], golden: dict) -> list[str]:
    """What is wrong with the records, one sentence each. Every Triton: does not compile, over a budget, wgmma lost. The
    Triton that ``golden`` was made with: more of anything than there, or another instruction."""
    known = {(entry["kernel"], entry["architecture"]): entry for entry in golden["resources"]}
    same = golden["triton"] == triton.__version__
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
        for key, limit in BUDGETS[record["architecture"]].items():
            if record[key] > limit:
                wrong.append(f"{name}: {key} {record[key]}, allowed {limit}")
            elif same and record[key] > before[key]:
                wrong.append(f"{name}: {key} {record[key]}, was {before[key]}")
        unit, expected = (entry["instruction"].split(".")[0] for entry in (record, before))
        if unit != expected and (same or expected == "wgmma"):
            wrong.append(f"{name}: multiplies by {unit}, was {expected}")
    return wrong


@click.command()
@click.option("--write", is_flag=True, help=f"Replace tests/{GOLDEN.name}.")
def main(write: bool) -> None:
    """Compile every variant of every kernel; compare registers, stack, shared memory and instruction."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    if not write and not GOLDEN.exists():
        raise click.ClickException(f"{GOLDEN} is not there to compare with: this command needs a checkout.")
    console = Console()
    chosen = variants()
    records = list(track(measure(chosen), "compiling", total=len(chosen), console=console, transient=True))
    table = Table(title=f"Largest over endings, Triton {triton.__version__}")
    for column in ("tiles", "architecture", "registers", "stack", "shared", "instruction"):
        table.add_column(column, justify="right" if column in BUDGETS["sm_80"] else "left", no_wrap=True)
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        if "error" not in record:
            groups.setdefault((record["kernel"].split("ed, ")[1], record["architecture"]), []).append(record)
    for (tiles, architecture), group in groups.items():
        largest = [str(max(record[key] for record in group)) for key in BUDGETS[architecture]]
        instructions = sorted({record["instruction"].split(".")[0] for record in group})
        table.add_row(tiles, architecture, *largest, ", ".join(instructions))
    console.print(table)
    if write:
        write_golden([record for record in records if "error" not in record])
    wrong = faults(records, read_golden())
    for sentence in wrong:
        console.print(sentence, markup=False)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
