"""The boundary to torch: hand-written declarations against torch's headers, the operators' own checks, its threads."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from deq import _library, activations
from deq import stats as layout
from deq.bench import instructions
from deq.plan import ANDERSON_DEPTH
from deq.profiling import counter, ranges
from deq.solvers.generic import compiled_steps

ROOT = Path(__file__).resolve().parents[1]
HEADER = (ROOT / "csrc" / "torch_abi.h").read_text()
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

CHECK = """
#define USE_CUDA  // shows the CUDA half, whose declarations need nothing of CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <type_traits>
#define DEQ_TORCH_TYPES_DECLARED
#include "torch_abi.h"
#define SAME(name, arguments) static_assert(std::is_same_v<decltype(&::name), int32_t(*) arguments>, #name);
DEQ_TORCH_FUNCTIONS(SAME)
DEQ_TORCH_CUDA_FUNCTIONS(SAME)
#define GETTER(name) static_assert(std::is_same_v<decltype(&::aoti_torch_dtype_##name), int32_t (*)()>, #name);
DEQ_TORCH_DTYPES(GETTER)
static_assert(std::is_same_v<StableIValue, uint64_t>);
static_assert(std::is_pointer_v<AtenTensorHandle> && std::is_pointer_v<TorchLibraryHandle>);
"""


def compile_check(folder: Path, header: str) -> subprocess.CompletedProcess:
    """Compile CHECK with ``header``, torch's headers showing only what torch 2.10 already had."""
    (folder / "torch_abi.h").write_text(header)
    (folder / "check.cpp").write_text(CHECK)
    include = Path(torch.__file__).parent / "include"
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the oldest torch that pyproject.toml allows
    command = [COMPILER, "-std=c++17", "-fsyntax-only", target, f"-I{folder}", f"-I{include}", folder / "check.cpp"]
    return subprocess.run(command, capture_output=True, text=True)


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler to read torch's headers with")
needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


@needs_compiler
def test_declarations_match_torch(tmp_path):
    done = compile_check(tmp_path, HEADER)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize(
    "right, wrong",
    [
        ("aoti_torch_get_dim, (AtenTensorHandle, int64_t*)", "aoti_torch_get_dim, (AtenTensorHandle, int32_t*)"),
        ("torch_get_num_threads, (uint32_t*)", "torch_get_num_threads, ()"),
        ("torch_get_num_threads, (uint32_t*)", "torch_list_size, (uint32_t*)"),
        ("F(uint8)", "F(float8)"),
        ("current_cuda_stream, (int32_t, void**)", "current_cuda_stream, (int64_t, void**)"),
        ("F(torch_get_num_threads, (uint32_t*))", "F(torch_exception_get_what, ())"),  # younger than torch 2.10
    ],
)
def test_wrong_declarations_are_caught(tmp_path, right, wrong):
    assert HEADER.count(right) == 1
    done = compile_check(tmp_path, HEADER.replace(right, wrong))
    assert done.returncode != 0
    assert wrong.split(",")[0].removeprefix("F(").rstrip(")") in done.stderr


# ---- structures of the C interface, written twice ------------------------------------------------------------------

_C_TYPES = {
    ctypes.c_int32: "int32_t",
    ctypes.c_int64: "int64_t",
    ctypes.c_double: "double",
    instructions.View: "struct DeqView",
    instructions.VIEW: "int64_t",
}


def members(header: str, name: str) -> list[tuple[str, str]]:
    """(name, type) of every member of a structure of csrc, "pointer" for any pointer."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / header).read_text())
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL).group(1)
    found = []
    for kind, names in re.findall(r"((?:const |struct )*\w+\s*\**) ?([\w, \[\]*]+);", body):
        for member in names.split(","):
            is_pointer = "*" in kind or "*" in member
            found.append((re.sub(r"[*\s]|\[.*\]", "", member), "pointer" if is_pointer else kind.strip()))
    return found


@pytest.mark.parametrize(
    ("header", "name", "structure"),
    [
        ("kernels.h", "DeqView", instructions.View),
        ("kernels.h", "DeqProblem", instructions.Problem),
        ("kernels.h", "DeqWork", counter.Work),
        ("kernels.h", "DeqSpan", ranges._Span),
        ("vector.h", "DeqSteps", compiled_steps._DeqSteps),
        ("cuda_kernels.h", "DeqCudaPlan", _library.CudaPlan),
    ],
)
def test_structures_are_those_of_the_headers(header, name, structure):
    declared = members(header, name)
    written = [(field, _C_TYPES.get(kind, "pointer")) for field, kind in structure._fields_]
    assert len(declared) > 1
    assert written == declared


# ---- operators ------------------------------------------------------------------------------------------------------

SIZES = (2, 3, 5)  # S, B, m
RUN = (0, ANDERSON_DEPTH, 0, 1e-5, 100, 0, 0)  # acceleration, depth, criterion, tol, max_iter, precision, reflected
RESULT = {"solve_": 3, "masked_linear_": 4, "derivative_": 3}  # position of the tensor that the result is written into


def stats(S=2, B=3, dtype=torch.float32):
    """A buffer for S x B samples, laid out as deq/stats.py tells."""
    return layout.allocate(torch.empty(S, B, 1, dtype=dtype))


def report():
    return torch.zeros(4, dtype=torch.int64)


def arguments(op: str, dtype=torch.float32, stacked: bool = True) -> list:
    """A well-formed call of ``op`` on W (S, m, m), or without S on the first W alone."""
    S, B, m = SIZES
    generator = torch.Generator().manual_seed(0)
    W = (0.1 * torch.randn(S, m, m, generator=generator)).to(dtype)
    c, d = (torch.rand(S, B, m, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(S, B, m, dtype=dtype)
    relu = activations.get_activation("relu").number
    triangle = torch.zeros(64, dtype=dtype), torch.zeros(m, dtype=dtype)  # one panel, the diagonal
    factors, q = [torch.zeros(1, 2, 8, dtype=dtype) for _ in range(2)], torch.zeros(B, 2, dtype=dtype)
    residual, none = torch.empty(B, dtype=dtype), torch.empty(0, dtype=dtype)
    call = {
        "solve_": [W, c, c[..., :0], out, stats(S, B, dtype), report(), relu, *RUN, 0.0],
        "masked_linear_": [W, c, d, c[..., :0], out, stats(S, B, dtype), report(), -1, *RUN],
        "derivative_": [W, c, d, out, relu],
        "product_": [c, d, W.clone(), 1.0, 0, 1],
        "invert_": [torch.eye(m, dtype=dtype)],
        "fingerprint": [W, torch.zeros(2, dtype=torch.int64)],
        "pack_triangle_": [W[0], *triangle, 0, 0],
        "reduced_": [*factors, triangle[1], c[0], none, q, q.clone(), residual, out[0], relu],
        "reduced_iterate_": [
            *factors,
            triangle[1],
            c[0],
            none,
            torch.eye(2).double(),
            q,
            q.clone(),
            residual,
            torch.zeros(B).int(),
            relu,
            1e-5,
            1e-6,
            0.5,
            10,
        ],
        "substitute_": [*triangle, c[0], none, out[0], none, residual, relu, 0],
    }[op]
    if stacked:
        return call
    single = [a[0] if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in call]
    return [stats(1, B, dtype) if isinstance(a, torch.Tensor) and a.dtype == torch.uint8 else a for a in single]


def operator(op: str):
    return getattr(torch.ops.deq, op).default


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["solve_", "masked_linear_", "derivative_", "fingerprint"])
def test_opcheck(op, dtype):
    torch.library.opcheck(operator(op), tuple(arguments(op, dtype)))
    torch.library.opcheck(operator(op), tuple(arguments(op, dtype, stacked=False)))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", ["product_", "invert_", "pack_triangle_", "substitute_", "reduced_", "reduced_iterate_"])
def test_opcheck_of_one_weight(op, dtype):
    torch.library.opcheck(operator(op), tuple(arguments(op, dtype)))


@needs_library
@pytest.mark.parametrize("op", ["solve_", "masked_linear_", "derivative_"])
def test_one_weight_without_its_dimension_is_the_same_problem(op):
    stacked, single = arguments(op), arguments(op, stacked=False)
    operator(op)(*stacked)
    at = RESULT[op]
    single_out = single[at] = torch.full_like(single[at], torch.nan)
    operator(op)(*single)
    assert torch.equal(single_out, stacked[at][0])


@needs_library
def test_every_operator_has_a_schema_that_names_what_it_writes():
    written = {
        "solve_": ["z", "stats", "report"],
        "masked_linear_": ["u", "stats", "report"],
        "derivative_": ["d"],
        "product_": ["out"],
        "invert_": ["A"],
        "fingerprint": ["out"],
        "pack_triangle_": ["packed", "diagonal"],
        "substitute_": ["z", "derivative", "residual"],
        "reduced_": ["following", "size", "z"],
        "reduced_iterate_": ["q", "following", "residual", "iterations"],
    }
    assert set(written) == set(_library.OPERATORS)
    for op, names in written.items():
        schema = operator(op)._schema
        assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == names
        assert schema.returns == []


S, B, m = SIZES
WRONG_TENSORS = {
    "W has two dimensions": ("solve_", 0, torch.zeros(m, m), r"c must be \(B, m\); got shape \(2, 3, 5\)"),
    "W has one dimension": ("solve_", 0, torch.zeros(m), r"W must be \(m, m\) or \(S, m, m\); got shape \(5\)"),
    "W is not square": ("solve_", 0, torch.zeros(S, m, m + 1), r"W must have shape \(2, 5, 5\); got \(2, 5, 6\)"),
    "W is of another dtype": ("solve_", 0, torch.zeros(S, m, m).double(), "W must be float32; got float64"),
    "c has two dimensions": ("solve_", 1, torch.zeros(B, m), r"c must be \(S, B, m\); got shape \(3, 5\)"),
    "c of integers": ("solve_", 1, torch.zeros(S, B, m).int(), "c must be float32, .*; got int32"),
    "c is complex": ("solve_", 1, torch.zeros(S, B, m).cfloat(), "c must be float32, .*; got torch's dtype number"),
    "z0 has no shape of a start": (
        "solve_",
        2,
        torch.zeros(1),
        r"z0 must be of the injection's shape, or .*; got shape \(1\)",
    ),
    "z0 for another batch": ("solve_", 2, torch.zeros(S, B + 1, m), r"z0 must have shape \(2, 3, 5\); got"),
    "z for another batch": ("solve_", 3, torch.zeros(S, B - 1, m), r"z must have shape \(2, 3, 5\); got \(2, 2, 5\)"),
    "z with scattered rows": ("solve_", 3, torch.zeros(S, m, B).mT, "z must have contiguous rows"),
    "z with one row for all": ("solve_", 3, torch.zeros(S, 1, m).expand(S, B, m), "z must .* not overlap"),
    "z with one batch for all": ("solve_", 3, torch.zeros(1, B, m).expand(S, B, m), "z must .* not overlap"),
    "stats of another dtype": ("solve_", 4, torch.zeros(54).char(), "stats must be uint8; got torch's dtype number"),
    "stats too short": ("solve_", 4, torch.zeros(53).byte(), r"stats must have shape \(54\); got \(53\)"),
    "stats with a place for every sample": ("solve_", 4, torch.zeros(S, B).byte(), r"stats must have shape \(54\)"),
    "stats with gaps": ("solve_", 4, torch.zeros(108).byte()[::2], "stats must be contiguous; got strides"),
    "stats that start anywhere": ("solve_", 4, torch.zeros(56).byte()[2:], "stats must begin at a multiple of 4"),
    "report too short": ("solve_", 5, torch.zeros(3).long(), r"report must have shape \(4\); got \(3\)"),
    "report of another dtype": ("solve_", 5, torch.zeros(4).int(), "report must be int64; got int32"),
    "report with gaps": ("solve_", 5, torch.zeros(8).long()[::2], "report must be contiguous; got strides"),
    "A for another width": ("masked_linear_", 0, torch.zeros(S, m - 1, m), "masked_linear_: A must have shape"),
    "d for another width": ("masked_linear_", 2, torch.zeros(S, B, m - 1), "masked_linear_: d must have shape"),
    "u0 for another batch": ("masked_linear_", 3, torch.zeros(S, B + 1, m), r"u0 must have shape \(2, 3, 5\); got"),
    "u of another dtype": ("masked_linear_", 4, torch.zeros(S, B, m).half(), "u must be float32; got float16"),
    "W without a contiguous direction": (
        "fingerprint",
        0,
        torch.zeros(6, 6)[::2, ::2],
        "W must have contiguous rows or",
    ),
    "W of a triangle is not square": ("pack_triangle_", 0, torch.zeros(m, 4), r"W must have shape \(5, 5\)"),
    "W of a triangle is integer": ("pack_triangle_", 0, torch.zeros(m, m).int(), "packed must be int32; got float32"),
    "packed too short": ("pack_triangle_", 1, torch.zeros(63), r"packed must have shape \(64\); got \(63\)"),
    "diagonal too long": ("pack_triangle_", 2, torch.zeros(6), r"diagonal must have shape \(5\); got \(6\)"),
    "packed for another width": ("substitute_", 0, torch.zeros(128), r"packed must have shape \(64\); got \(128\)"),
    "diagonal of another dtype": ("substitute_", 1, torch.zeros(m).double(), "diagonal must be float32; got float64"),
    "diagonal without a unique root": ("substitute_", 1, torch.ones(m), "the diagonal admits more than one solution"),
    "c with scattered rows": ("substitute_", 2, torch.zeros(m, B).mT, "c must have contiguous rows"),
    "mask for another batch": ("substitute_", 3, torch.zeros(B + 1, m), r"mask must have shape \(3, 5\)"),
    "z of substitution with one row": ("substitute_", 4, torch.zeros(1, m).expand(B, m), "z must .* not overlap"),
    "derivative too narrow": ("substitute_", 5, torch.zeros(B, m - 1), r"derivative must have shape \(3, 5\)"),
    "residual of half precision": ("substitute_", 6, torch.zeros(B).half(), "residual must be float32; got float16"),
    "P of another rank": ("reduced_", 0, torch.zeros(1, 3, 8), r"P must have shape \(1, 2, 8\); got \(1, 3, 8\)"),
    "Q of another width": ("reduced_", 1, torch.zeros(2, 2, 8), r"Q must have shape \(1, 2, 8\); got \(2, 2, 8\)"),
    "q of another batch": ("reduced_", 5, torch.zeros(B + 1, 2), r"q must have shape \(3, 2\); got \(4, 2\)"),
    "following with one row": ("reduced_", 6, torch.zeros(1, 2).expand(B, 2), "following must .* not overlap"),
    "z of another width": ("reduced_", 8, torch.zeros(B, 4), r"z must have shape \(3, 5\); got \(3, 4\)"),
    "gram of another rank": ("reduced_iterate_", 5, torch.zeros(3, 3).double(), r"gram must have shape \(2, 2\)"),
    "gram in single precision": ("reduced_iterate_", 5, torch.zeros(2, 2), "gram must be float64; got float32"),
    "iterations of a reduction too long": (
        "reduced_iterate_",
        9,
        torch.zeros(4).int(),
        r"iterations must have shape \(3\)",
    ),
    "size too precise": ("reduced_", 7, torch.zeros(B).double(), "size must be float32; got float64"),
    "W has four dimensions": ("fingerprint", 0, torch.zeros(1, 1, 2, 2), r"W must be \(rows, columns\) or"),
    "fingerprint too long": ("fingerprint", 1, torch.zeros(3).long(), r"out must have shape \(2\); got \(3\)"),
    "left has one dimension": ("product_", 0, torch.zeros(m), r"left must be a matrix or a stack .*; got shape \(5\)"),
    "left of half precision": ("product_", 0, torch.zeros(S, B, m).half(), "right must be float16; got float32"),
    "right for another batch": ("product_", 1, torch.zeros(S, B + 1, m), r"right must have shape \(2, 3, 5\); got"),
    "right without its stack": ("product_", 1, torch.zeros(B, m), r"right must be \(S, inner, columns\); got shape"),
    "out with gaps": ("product_", 2, torch.zeros(S, m, 2 * m)[..., ::2], "out must have contiguous rows"),
    "out with one row": ("product_", 2, torch.zeros(S, 1, m).expand(S, m, m), "out must .* not overlap"),
    "out of another dtype": ("product_", 2, torch.zeros(S, m, m).double(), "out must be float32; got float64"),
    "A of a block is not square": ("invert_", 0, torch.zeros(3, 4), r"A must have shape \(3, 3\); got \(3, 4\)"),
    "A of a block with scattered rows": ("invert_", 0, torch.eye(8)[:, ::2][:4], "A must have contiguous rows"),
    "A of a block in half precision": ("invert_", 0, torch.eye(3).half(), "A must be float32 or float64; got float16"),
    "z of another dtype": ("derivative_", 2, torch.zeros(S, B, m).double(), "derivative_: z must be float32"),
}
WRONG_NUMBERS = {
    "a weight smaller than nothing": ("solve_", 14, -1.0, "largest_weight must not be negative or NaN"),
    "activation unknown": ("solve_", 6, 99, "solve_: an argument is out of range .activation 99"),
    "activation negative": ("solve_", 6, -1, "activation must lie in 0"),
    "acceleration": ("solve_", 7, 3, "acceleration must lie in 0..2; got 3"),
    "depth": ("solve_", 8, -1, "depth must lie in 0"),
    "criterion": ("solve_", 9, 2, "criterion must lie in 0..1; got 2"),
    "tol is NaN": ("solve_", 10, float("nan"), "tol must not be negative or NaN"),
    "tol is negative": ("solve_", 10, -1e-3, "tol must not be negative or NaN"),
    "max_iter is 0": ("solve_", 11, 0, "max_iter must lie in 1"),
    "precision": ("solve_", 12, 3, "precision must lie in 0..2; got 3"),
    "reflected": ("solve_", 13, 2, "reflected must lie in 0..1; got 2"),
    "max_iter is huge": ("solve_", 11, 2**40, "max_iter must lie in 1.*; got 1099511627776"),
    "mask of an activation that hides it": (
        "masked_linear_",
        7,
        activations.get_activation("gelu").number,
        "masked_linear_: an argument is out of range",
    ),
    "product that adds twice": ("product_", 4, 2, "adds must lie in 0..1; got 2"),
    "product transposed twice": ("product_", 5, 2, "transposed must lie in 0..1; got 2"),
    "substitution with an unknown activation": ("substitute_", 7, 99, "substitute_: an argument is out of range"),
    "substitution that is half reversed": ("substitute_", 8, 2, "reversed must lie in 0..1; got 2"),
    "reduction of no steps": ("reduced_iterate_", 14, 0, "max_iter must lie in 1"),
    "reduction to a negative tolerance": ("reduced_iterate_", 11, -1.0, "tol must not be negative or NaN"),
    "reduction with an unknown activation": ("reduced_", 9, 99, "reduced_: an argument is out of range"),
    "derivative of an unknown activation": ("derivative_", 4, 99, "derivative_: an argument is out of range"),
}


@needs_library
@pytest.mark.parametrize("case", WRONG_TENSORS | WRONG_NUMBERS)
def test_wrong_call_raises_and_names_the_argument(case):
    op, position, value, message = (WRONG_TENSORS | WRONG_NUMBERS)[case]
    wrong = arguments(op)
    operator(op)(*wrong)  # right up to here
    wrong[position] = value
    with pytest.raises(RuntimeError, match=message):
        operator(op)(*wrong)


@needs_library
def test_width_zero_raises():
    empty = torch.zeros(S, B, 0)
    with pytest.raises(RuntimeError, match="width 0"):
        operator("solve_")(torch.zeros(S, 0, 0), empty, empty, empty.clone(), stats(), report(), 1, *RUN, 0.0)


@needs_library
@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5), (0, 0, 1)])
def test_no_samples_is_no_work(shape):
    S, B, m = shape
    c, said = torch.zeros(shape), report().fill_(1)
    operator("solve_")(torch.zeros(S, m, m), c, c, c.clone(), stats(S, B), said, 1, *RUN, 0.0)
    assert said.tolist() == [0, 0, 0, 0]


@needs_library
@pytest.mark.parametrize("spoil", [None, 4], ids=["success", "error"])
def test_no_argument_is_kept_alive(spoil):
    call = arguments("solve_")
    refs = [StorageWeakRef(a.untyped_storage()) for a in call if isinstance(a, torch.Tensor)]
    if spoil is None:
        operator("solve_")(*call)
    else:
        call[spoil] = torch.zeros(1)
        refs[spoil] = StorageWeakRef(call[spoil].untyped_storage())
        with pytest.raises(RuntimeError, match="stats must"):
            operator("solve_")(*call)
    del call
    assert [ref.expired() for ref in refs] == [True] * len(refs)


THREADS = """
import os, torch, deq
def team():
    return len(os.listdir("/proc/self/task"))
def solve():
    z = torch.empty(1, 256, 64)
    W, c = torch.full((1, 64, 64), 0.01), torch.ones(1, 256, 64)
    torch.ops.deq.solve_(W, c, c, z, deq.stats.allocate(z), torch.zeros(4).long(), 1, 0, 5, 0, 1e-5, 100, 0, 0, 0.0)
    return team()
torch.set_num_threads(1)
torch.ones(2**20).exp()
before = team()
one = solve()
torch.set_num_threads(3)
three = solve()
torch.ones(2**22).exp()
print(one - before, three - before, team() - before)
"""


@pytest.mark.skipif(not _library.build.get("openmp"), reason="the library was built without OpenMP, or not at all")
def test_threads_are_those_of_torch():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    # One thread adds none, three add two, and torch's own work afterwards finds its team already there.
    assert done.stdout.split() == ["0", "2", "2"]
