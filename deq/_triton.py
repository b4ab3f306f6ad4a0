"""Whether the Triton backend can run here. Triton is imported only where somebody asks."""

from functools import lru_cache

import torch

LEAST_CAPABILITY = (8, 0)  # Ampere: asynchronous copies and tf32 on tensor cores


@lru_cache(maxsize=8)
def why_not(device: str) -> str:
    """Why the Triton backend cannot solve tensors of this device type ("cpu", "cuda", ...) here, "" if it can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if device == "cuda":
        if torch.version.hip:
            return "its kernels are for NVIDIA GPUs"
        least = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if least < LEAST_CAPABILITY:
            return f"its kernels need compute capability 8.0; a GPU here has {least[0]}.{least[1]}"
        return ""
    if device == "cpu":
        return "" if triton.knobs.runtime.interpret else "CPU tensors need Triton's interpreter, which is off"
    return f"it has no kernels for {device} tensors"
