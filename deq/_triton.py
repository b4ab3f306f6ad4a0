"""Whether the Triton backend can run here. Triton is imported only where somebody asks."""

from functools import lru_cache

import torch

from .backends import load
from .gpu_device import why_too_old


def why_not(device: str) -> str:
    """Why the Triton backend cannot solve tensors of this device ("cpu", "cuda:1", ...; "cuda": of the best GPU here),
    "" if it can: then it has been loaded."""
    return _why_not(device)


# torch.compile takes the answer for a constant and does not look into the import of Triton. This is what
# torch.compiler.assume_constant_result does, which would import all of torch._dynamo here.
why_not._dynamo_marked_constant = True


@lru_cache(maxsize=64)
def _why_not(device: str) -> str:
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if device.startswith("cuda"):
        if torch.version.hip:
            return "its kernels are for NVIDIA GPUs"
        if not torch.cuda.is_available():  # a FakeTensorMode has tensors on devices that are not there
            return "torch sees no device" if torch.version.cuda else "this torch is a CPU build"
        if reason := why_too_old(device) or why_not_launch():
            return reason
    elif device != "cpu":
        return f"it has no kernels for {device} tensors"
    elif not triton.knobs.runtime.interpret:
        return "CPU tensors need Triton's interpreter, which is off"
    load("triton")
    return ""


@lru_cache(maxsize=1)
def why_not_launch() -> str:
    """Why Triton cannot launch kernels on a GPU here, "" if it can. It builds what launches them with a C compiler and
    the headers of Python, of which runtime images of containers often have neither."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if triton.knobs.runtime.interpret:
        return ""
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:  # of a compiler, a driver or a cache
        return f"Triton cannot launch kernels here: {error}"
    return ""
