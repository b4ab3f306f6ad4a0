"""Instructions of solves, counted by callgrind: the same on every run and on a busy machine.

Run as a program (``python instructions.py LIBRARY ISA CASES``) it solves each case twice through the C interface,
without torch, which under callgrind would take minutes to load; :func:`count` runs that program and reads what it cost.
A linear congruential generator makes the problems, so that they are the same everywhere.

Callgrind emulates a processor with AVX2 and nothing beyond: what is counted is avx2 and portable, in float32 and
float64, on one thread. AVX-512 and int8 increments are held by the counts of bench/guard.py alone.
"""

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VIEW = ctypes.c_int64 * 3
BOUNDARY = "ffi_call"  # libffi's, through which ctypes calls: found by name in stripped libraries too; 800 instructions


class View(ctypes.Structure):
    """DeqView of csrc/kernels.h."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", VIEW))


class Problem(ctypes.Structure):
    """DeqProblem."""

    _fields_ = (
        ("weights", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("W", View),
        ("injection", View),
        ("start", View),
        ("mask", View),
        ("mask_is_value", ctypes.c_int32),
        ("out", View),
        ("iterations", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("report", ctypes.c_void_p),
        ("acceleration", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("criterion", ctypes.c_int32),
        ("max_iter", ctypes.c_int64),
        ("tol", ctypes.c_double),
        ("threads", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("largest_weight", ctypes.c_double),
        ("reflected", ctypes.c_int32),
    )


def _uniform(seed: int):
    """Numbers in [-1, 1)."""
    state = seed
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield (state >> 33) / 2**30 - 1.0


def solve(library: ctypes.CDLL, case: dict, calls: int = 2) -> int:
    """Solves one case ``calls`` times on one thread; its evaluations, of all samples. RuntimeError if any failed."""
    m, B, double = case["m"], case["B"], case["dtype"] == "float64"
    real = ctypes.c_double if double else ctypes.c_float
    uniform = _uniform(m * 1000 + B)
    size = case["radius"] * (3.0 / m) ** 0.5  # of uniform numbers: variance radius^2 / m
    W = (real * (m * m))(*(size * next(uniform) for _ in range(m * m)))
    c = (real * (B * m))(*(2 * next(uniform) for _ in range(B * m)))
    mask = (real * (B * m))(*(float(next(uniform) > 0) for _ in range(B * m)))
    out, iterations, residual = (real * (B * m))(), (ctypes.c_int32 * B)(), (real * B)()
    status, report = (ctypes.c_uint8 * B)(), (ctypes.c_int64 * 4)()

    def rows(data) -> View:
        return View(ctypes.addressof(data), VIEW(B * m, m, 1))

    problem = Problem(weights=1, batch=B, width=m, type=int(double), activation=case["activation"])
    problem.W = View(ctypes.addressof(W), VIEW(m * m, m, 1))
    problem.injection, problem.out = rows(c), rows(out)
    if case["masked"]:
        problem.mask = rows(mask)
    for name, data in (("iterations", iterations), ("residual", residual), ("status", status), ("report", report)):
        setattr(problem, name, ctypes.addressof(data))
    problem.acceleration, problem.depth, problem.max_iter = case["acceleration"], 5, 1000
    problem.tol, problem.threads = (1e-10 if double else 1e-5), 1
    for _ in range(calls):
        error = library.deq_cpu_solve(ctypes.byref(problem))
        if error or report[0]:
            raise RuntimeError(f"case {case}: error {error}, {report[0]} samples did not converge")
    return sum(iterations)


def count(library: Path, isa: str, cases: list[dict]) -> list[dict[str, int]]:
    """For every case the instructions of its first solve, which packs W, and of the same again; and its evaluations.

    RuntimeError without valgrind, or if anything goes wrong under it.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("instructions are counted by valgrind, which is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--toggle-collect={BOUNDARY}",
            f"--dump-after={BOUNDARY}",
            f"--callgrind-out-file={folder}/out",
            *(sys.executable, "-S", "-E", __file__, str(library), isa, json.dumps(cases)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:3])} ... failed:\n{done.stderr[-2000:]}")
        evaluations = json.loads(done.stdout)
        dumps = [Path(folder) / f"out.{i + 2}" for i in range(2 * len(cases))]  # the first call chooses the kernels
        if not all(dump.exists() for dump in dumps):
            raise RuntimeError(f"callgrind did not find {BOUNDARY} in this Python")
        totals = [_total(dump) for dump in dumps]
    return [{"first": totals[2 * i], "again": totals[2 * i + 1], "evaluations": n} for i, n in enumerate(evaluations)]


def _total(dump: Path) -> int:
    line = next(line for line in dump.read_text().splitlines() if line.startswith(("summary:", "totals:")))
    return int(line.split()[1])


if __name__ == "__main__":
    shared = ctypes.CDLL(sys.argv[1])
    if shared.deq_cpu_set_isa(sys.argv[2].encode()):
        sys.exit(f"this CPU, as valgrind shows it, or this build has no {sys.argv[2]} kernels")
    print(json.dumps([solve(shared, case) for case in json.loads(sys.argv[3])]))
