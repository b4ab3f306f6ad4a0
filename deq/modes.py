"""Modes of torch that a solve meets: autocast, hooks on saved tensors, tracing and captures, and no numbers at all."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def has_autocast(device: str) -> bool:
    """Whether it is on for that type of device, which torch does not ask of "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> AbstractContextManager:
    """Autocast disabled: a residual below the rounding of 16 bits needs more, forward and backward."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def apart_from_autocast(device: str) -> AbstractContextManager:
    """While active, functions of callers run as if no autocast were around: disabled, and without its cache of weights.

    A function may have an autocast of its own, which inside of any other, even a disabled one, finds what was cached
    before; a backward pass that comes when the other is over would not find it again.
    """
    if device == "meta":
        return nullcontext()
    _, depth = map(_call, _UP_AND_DOWN)  # the number can be had in no other way
    return torch.autocast(device, enabled=False, cache_enabled=False) if depth > 0 else nullcontext()


# Called by one step of Python's: Ctrl-C between the two would leave torch one autocast deep for good, and the weights
# that autocast has rounded are forgotten where the outermost ends.
_UP_AND_DOWN = torch.autocast_increment_nesting, torch.autocast_decrement_nesting
_call = type(torch.autocast_increment_nesting).__call__


def vjp(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable]:
    """torch.func.vjp as if no hooks on saved tensors were around, as checkpointing has: it refuses them, and what it
    saves is inside of the transform."""
    hooks = []
    try:
        while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            hooks.append(pair)
        return torch.func.vjp(f, *primals)
    finally:
        for pair in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def lacks_numbers(t: Tensor) -> bool:
    """Whether it has a shape and no numbers: on the meta device, or of a FakeTensorMode."""
    return t.is_meta or (type(t) is not Tensor and isinstance(t, FakeTensor))


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def refuse_tracing(what: str, instead: str) -> None:
    """Raise RuntimeError inside of make_fx and what is made of it, such as torch.func.linearize, and of
    torch.jit.trace: compiled code and the numbers that it decides by would be missing in the trace, and nobody would
    say so."""
    if torch._C._get_dispatch_mode(_PROXY) is not None:
        tracer = "make_fx and torch.func.linearize"
    elif torch._C._is_tracing():
        tracer = "torch.jit.trace"
    else:
        return
    raise RuntimeError(f"{tracer} cannot trace {what}, which stops by its numbers; {instead} can")


def is_captured(like: Tensor) -> bool:
    """Whether a CUDA graph is captured, in which nothing can be read."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
