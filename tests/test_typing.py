"""What a type checker sees of the public interface (deq/py.typed)."""

import subprocess
import sys
from pathlib import Path

import deq

PROGRAM = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import deq
from deq.fixed_point import StateSolution
from deq.profiling import Report

W, c = torch.eye(8) / 2, torch.ones(4, 8)
solution = deq.solve(W, c, "tanh", tol=1e-4)
assert_type(solution, deq.Solution)
assert_type(solution.z, Tensor)
solution.plan.explain()
assert_type(deq.solve(deq.weights.Diagonal(c[0] / 2), c).status, Tensor)
assert_type(deq.nn.EquilibriumLinear(3, 8).solution, deq.Solution | None)
assert_type(deq.profile(deq.solve, W, c), Report)

def swap(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.tanh(state[1] @ W), torch.tanh(state[0] @ W)

assert_type(deq.fixed_point(swap, (c, c)), StateSolution)
assert_type(deq.fixed_point(lambda z: torch.tanh(z @ W + c), c), StateSolution)
deq.fixed_point(lambda z: [torch.tanh(part) for part in z], [c, c])
deq.solve(W, 3)  # refused
deq.fixed_point(swap, c)  # refused
"""


def test_public_interface(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    # Not what is installed: of an editable install checkers cannot see where its modules are.
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "deq").symlink_to(Path(deq.__file__).parent)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", tmp_path / "cache", program],
        env={"MYPYPATH": str(sources)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    lines = {int(line.split(":")[1]) for line in errors}
    refused = {n for n, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# refused")}
    assert lines == refused, found.stdout + found.stderr
