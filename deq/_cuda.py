"""Whether the CUDA backend can run here."""

from functools import lru_cache

import torch

from . import _library
from .backends import load
from .gpu_device import why_too_old


@lru_cache(maxsize=64)
def why_not(device: str) -> str:
    """Why the compiled CUDA kernels cannot solve tensors of this device ("cpu", "cuda:1", ...; "cuda": of the best GPU
    here), "" if they can: then the backend has been loaded."""
    if not _library.has_cuda:
        return _library.build.get("why_not_cuda") or _library.reason or "the library was built without CUDA"
    if not device.startswith("cuda"):
        return f"it has no kernels for {device} tensors"
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch sees no device" if torch.version.cuda else "this torch is a CPU build"
    if reason := why_too_old(device):
        return reason
    load("cuda")
    return ""
