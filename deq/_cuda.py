"""Whether the CUDA backend can run here."""

from functools import lru_cache

import torch

from . import _library
from .backends import load

LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores


@lru_cache(maxsize=8)
def why_not(device: str) -> str:
    """Why the compiled CUDA kernels cannot solve tensors of this device type ("cpu", "cuda", ...), "" if they can: then
    the backend has been loaded."""
    if not _library.has_cuda:
        return _library.build.get("why_not_cuda") or _library.reason or "the library was built without CUDA"
    if device != "cuda":
        return f"it has no kernels for {device} tensors"
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch sees no device" if torch.version.cuda else "this torch is a CPU build"
    least = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if least < LEAST_CAPABILITY:
        return f"its kernels need compute capability 8.0; a GPU here has {least[0]}.{least[1]}"
    load("cuda")
    return ""
