"""Compiles Triton kernels ahead of time and reads what became of them: no GPU and no driver needed.

In processes of their own, because an interpreted kernel cannot be compiled and because the compiler may abort. Triton
keeps what it has compiled by the hash of source and options: the same variant is compiled but once a machine.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import deq
from deq.kernels.compilation import Compilation

TOOLS = Path(nvidia.__file__).parent / "bin"  # cuobjdump and nvdisasm, which Triton ships
BATCH = 12  # variants a process: its start, two seconds of imports, is spread over as many


def compile_all(jobs: Sequence[tuple[Compilation, str]]) -> Iterator[dict]:
    """One record a (variant, architecture), not in their order: kernel, architecture, registers and stack bytes per
    thread, shared bytes per block, instruction; or kernel, architecture and error where the compiler refused."""
    workers = max(1, min(os.cpu_count() or 1, len(jobs), 8))
    count = max(workers, -(-len(jobs) // BATCH))
    with ThreadPoolExecutor(workers) as pool:
        # Neighbours take about as long as each other: they go into different parts.
        for records in pool.map(_compile_apart, (jobs[first::count] for first in range(count))):
            yield from records


def _compile_apart(jobs: Sequence[tuple[Compilation, str]]) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the same deq, wherever this one came from
    python = [sys.executable, *(["-S"] if sys.flags.no_site else [])]
    records: list[dict] = []
    while len(records) < len(jobs):
        left = jobs[len(records) :]
        done = subprocess.run(
            [*python, "-c", f"from {__name__} import _work; _work()"],
            input=json.dumps([[asdict(variant), architecture] for variant, architecture in left]),
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(deq.__file__).parents[1],
        )
        records += [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode != 0:  # one that the compiler aborts on is recorded, and the rest gets a new process
            variant, architecture = jobs[len(records)]
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            records.append({"kernel": variant.name, "architecture": architecture, "error": reason})
    return records


def _work() -> None:
    for entry, architecture in json.load(sys.stdin):
        record = {"kernel": entry["name"], "architecture": architecture}
        print(json.dumps(record | _compile(Compilation(**entry), architecture)), flush=True)


def _compile(variant: Compilation, architecture: str) -> dict:
    module, name = variant.function.split(":")
    function = getattr(import_module(f"deq.kernels.{module}"), name)
    names = function.arg_names
    kernel = triton.compile(
        ASTSource(
            function,
            signature={name: variant.types.get(name, "constexpr") for name in names},
            constexprs=variant.constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
        ),
        target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32),
        options={
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            "maxnreg": variant.registers,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (usage,) = read_usage(Path(file.name)).values()
    return usage | {"shared": kernel.metadata.shared, "instruction": _instruction(kernel.asm["ptx"])}


def read_usage(binary: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and shared bytes of every kernel in a cubin or a library, by (kernel, architecture).

    Kernels are named as the linker knows them. Shared bytes are those known when it was compiled.
    """
    text = _tool("cuobjdump", "--dump-resource-usage", binary)
    found, architecture, name = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", line)}
            found[name, architecture] = {
                "registers": values["REG"],
                "stack": values["STACK"],
                "shared": values["SHARED"],
            }
    return found


def _instruction(ptx: str) -> str:
    """The instruction that multiplies: that of the tensor cores if there is one."""
    found = re.findall(r"\b(wgmma\.mma_async\.[\w.]+|mma\.sync\.[\w.]+|tcgen05\.mma\.[\w.:]+)", ptx)
    return " + ".join(sorted(set(found))) or "fma"


def read_instructions(binary: Path) -> dict[tuple[str, str], str]:
    """The machine instructions that multiply on tensor cores, by (kernel, architecture); "fma" where there are none."""
    found: dict[tuple[str, str], set[str]] = {}
    architecture, name = "", ""
    for line in _tool("cuobjdump", "--dump-sass", binary).splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
            found[name, architecture] = set()
        elif match := re.search(r"\b((?:[HDIQ]G?MMA|UTC\w*MMA)\.[\w.]+)", line):
            found[name, architecture].add(match[1])
    return {key: " + ".join(sorted(names)) or "fma" for key, names in found.items()}


def _tool(name: str, option: str, binary: Path) -> str:
    environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}  # cuobjdump calls nvdisasm
    command = [TOOLS / name, option, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
