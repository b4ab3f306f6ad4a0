"""Finds the compiled library, loads it, and registers its operators with torch.

``compiled`` is the library with its C signatures (csrc/kernels.h), or None: then ``reason`` says why, and solves run on
the reference backend. ``path`` is its file and ``build`` what CMake recorded about how it was built.
"""

import ctypes
import json
import warnings
from functools import lru_cache
from pathlib import Path

import torch

import deq

from .plan import INCREMENTS

OPERATORS = (
    "solve_",
    "masked_linear_",
    "derivative_",
    "product_",
    "invert_",
    "fingerprint",
    "pack_triangle_",
    "substitute_",
    "reduced_",
    "reduced_iterate_",
)

CUDA_OPERATORS = ("cuda_solve_", "cuda_masked_linear_", "cuda_rescue_", "cuda_substitute_")


class CudaPlan(ctypes.Structure):
    """DeqCudaPlan of csrc/cuda_kernels.h: how a problem runs on a device."""

    _fields_ = (
        ("regime", ctypes.c_int32),
        ("kernel", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("shared", ctypes.c_int64),
        ("scratch", ctypes.c_int64),
    )


# Exported function: result type, argument types.
_SIGNATURES = {
    "deq_version": (ctypes.c_char_p,),
    "deq_register": (ctypes.c_char_p,),
    "deq_cpu_isa": (ctypes.c_char_p,),
    "deq_cpu_has_precision": (ctypes.c_int32, ctypes.c_int32),
    "deq_cpu_set_isa": (ctypes.c_int32, ctypes.c_char_p),
    "deq_cpu_clear_cache": (ctypes.c_int64,),
    "deq_cpu_cache_bytes": (ctypes.c_int64,),
    "deq_cpu_sample_bytes": (ctypes.c_int64, ctypes.c_int32),
    "deq_cpu_step_sums": (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32),
    "deq_cpu_advance": (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
    "deq_cpu_collect": (None, ctypes.c_void_p),
    "deq_cpu_norm": (ctypes.c_double, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32),
    "deq_cpu_peak_gflops": (ctypes.c_double, ctypes.c_int32, ctypes.c_double),
    "deq_cpu_last_work": (None, ctypes.c_void_p),
    "deq_trace_start": (None,),
    "deq_trace_stop": (ctypes.c_int64,),
    "deq_trace_read": (ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    "deq_trace_attach": (ctypes.c_int32,),
    "deq_cpu_read_gbs": (ctypes.c_double, ctypes.c_int64, ctypes.c_double),
    "deq_cpu_kernel_gflops": (ctypes.c_double, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_double),
}

_CUDA_SIGNATURES = {  # of a library that was built with CUDA
    "deq_register_cuda": (ctypes.c_char_p,),
    "deq_cuda_why": (ctypes.c_char_p,),
    "deq_cuda_kernel": (
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_int64,
    ),
    "deq_cuda_measure": (ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_double)),
    "deq_cuda_rescue_plan": (ctypes.c_int32, *(ctypes.c_int64,) * 3, ctypes.c_int32, ctypes.POINTER(CudaPlan)),
    "deq_cuda_substitute_bytes": (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    "deq_cuda_plan": (ctypes.c_int32, *(ctypes.c_int64,) * 3, *(ctypes.c_int32,) * 2, ctypes.POINTER(CudaPlan)),
}


def _find(name: str) -> Path | None:
    # Along the package's path and not beside this file: an editable install keeps built files in site-packages.
    return next((file for folder in deq.__path__ if (file := Path(folder) / name).is_file()), None)


def _load(path: Path) -> ctypes.CDLL:
    """The library at ``path``, its operators registered. Raises ImportError saying why it cannot be used."""
    try:
        library = ctypes.CDLL(str(path))
        signatures = _SIGNATURES | (_CUDA_SIGNATURES if hasattr(library, "deq_register_cuda") else {})
        for name, (result, *arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ImportError(f"{path} cannot be loaded: {error}") from error
    version = library.deq_version().decode()
    if version != deq.__version__:
        raise ImportError(f"{path} belongs to deq {version}, this is deq {deq.__version__}: install it again")
    has_cuda = "deq_register_cuda" in signatures
    if problem := library.deq_register() or (has_cuda and library.deq_register_cuda()):
        raise ImportError(f"{path} cannot be used with torch {torch.__version__}: {problem.decode()}")
    for name in OPERATORS + (
        CUDA_OPERATORS if has_cuda else ()
    ):  # they write into tensors that the caller allocated: nothing to do for a fake tensor
        torch.library.register_fake(f"deq::{name}", lambda *arguments: None)
    library.deq_trace_attach()
    return library


def _read_build() -> dict:
    file = _find("_build.json")
    return json.loads(file.read_text()) if file else {}


build = _read_build()
path = _find("libdeq.so")
compiled, reason = None, ""
has_cuda = False  # whether ``compiled`` has the CUDA kernels; ``build`` says why not
if path is None:
    reason = build.get("why_not", "") or "this is a bare checkout: nothing has been built (pip install -e . builds it)"
else:
    try:
        compiled = _load(path)
        has_cuda = hasattr(compiled, "deq_register_cuda")
    except ImportError as error:
        reason = str(error)
        warnings.warn(f"deq runs without its compiled library. {reason}", RuntimeWarning, stacklevel=2)


@lru_cache(maxsize=1)  # asked at every solve: 10 us where caches are cold
def increments() -> str:
    """The increments that go with the instruction set in use: "int8", "bfloat16", or "native" for none."""
    if compiled is not None:
        for name in ("int8", "bfloat16"):
            if compiled.deq_cpu_has_precision(INCREMENTS[name]):
                return name
    return "native"


def use_isa(name: str) -> bool:
    """Solve with the instruction set ``name`` from now on ("auto": the best); False if this CPU or build has it not."""
    increments.cache_clear()
    return compiled is not None and compiled.deq_cpu_set_isa(name.encode()) == 0
