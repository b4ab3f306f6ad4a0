"""An equilibrium layer as one operator, for torch.compile and torch.export.

A solve decides by its numbers when to stop, which no graph can hold: in a compiled graph it is the opaque operator
``deq::equilibrium``, its gradient another. They know their layer by a number that is good for this process, and draw
the masks of its dropout from a seed: both are tensors, which a graph takes as it finds them, where it would be compiled
anew for every other number.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..applied import Applied
from ..members import Exchanged, Members, Unsteady, enclosed, modules_used, modules_with_masks
from ..spectral_norms import TorchNorm, norms_of
from ..state import State, parts_of
from ..traced import AUTOGRAD, included
from .dropout import VariationalDropout

_numbers = itertools.count()
_layers: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()


def register(layer: nn.Module) -> Tensor:
    """The number, int64 on the CPU, by which the operators find ``layer`` as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def new_seed(block: object) -> Tensor | None:
    """Of the masks of one call, int64 on the CPU; None for a block that draws none."""
    if not Unsteady.exist or (isinstance(block, nn.Module) and not any(map(_may_draw, block.modules()))):
        return None
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def _may_draw(module: nn.Module) -> bool:
    """Whether it draws masks, or has a function as its block, which may, and which no graph can look into."""
    return (isinstance(module, VariationalDropout) and module.training) or callable(module.__dict__.get("block"))


def modes_of(block: object) -> str:
    """Of every module in ``block``, whether it trains: "1" or "0"."""
    return "".join("01"[module.training] for module in block.modules()) if isinstance(block, nn.Module) else ""


def moving_of(block: object) -> list[Tensor]:
    """The buffers in ``block`` that change when training reads a weight, as those of a spectral norm do."""
    return [place[name] for place, name in _moving_places(block)]


def _moving_places(block: object) -> list[tuple[dict, str]]:
    if not isinstance(block, nn.Module):
        return []
    moving = [module for module in block.modules() if getattr(module, "_moves_buffers", False)]
    own = [(module._buffers, name) for module in moving for name in module._buffers]
    return own + [place for norm in _torch_norms(block) for place in norm.places()]


def _torch_norms(block: object) -> list[TorchNorm]:
    return [norm for module in block.modules() for norm in norms_of(module)] if isinstance(block, nn.Module) else []


def _in_modes(block: object, modes: str) -> AbstractContextManager:
    """While active, the modules of ``block`` are in the modes of the call, whatever the caller did since."""
    if not isinstance(block, nn.Module):
        return nullcontext()
    places = []
    for module, mode in zip(block.modules(), modes, strict=True):
        own, trains = module.__dict__, mode == "1"
        if own.get("training", trains) is not trains:  # one of TorchScript keeps it elsewhere
            places.append((own, "training", trains))
    return Exchanged(places) if places else nullcontext()


def _layer(number: Tensor) -> nn.Module:
    try:
        return _layers[int(number)]
    except KeyError:
        raise RuntimeError(
            "deq::equilibrium: its layer is gone; a compiled or exported graph serves while the layer that it was made "
            "from lives in the same process"
        ) from None


# All that blocks may use outside of an operator: autograd, transforms of torch.func, views that conjugate or negate. A
# compiled graph calls operators without.
_EAGER = (
    *AUTOGRAD,
    *(
        getattr(torch._C.DispatchKey, name)
        for name in (
            *("Conjugate", "Negative", "ZeroTensor", "FuncTorchGradWrapper", "FuncTorchBatched", "FuncTorchVmapMode"),
            *("FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"),
        )
    ),
)


@contextmanager
def _masks(block: object, seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """While active, dropout in ``block`` has the masks that ``seed`` gives; torch's generators stay where they are."""
    if seed is None:
        yield
        return
    inside = {module: None for root in modules_with_masks(block) for module in root.modules()}
    dropouts = [module for module in inside if isinstance(module, VariationalDropout)]
    before = [dropout.mask for dropout in dropouts]
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []), enclosed:
        torch.default_generator.manual_seed(int(seed))
        if on_gpu:
            torch.cuda.default_generators[device.index].manual_seed(int(seed))
        try:
            for dropout in dropouts:
                dropout.reset_mask()
            yield
        finally:
            for dropout, mask in zip(dropouts, before, strict=True):
                dropout.mask = mask


def _function(layer: nn.Module, inputs: list[Tensor], parameters: list[Tensor]) -> Callable:
    """The block as a function of the state. Not by torch.func.functional_call: where the block has a module twice, that
    leaves the ``parameters`` in it (as of torch 2.13)."""
    block = layer.block
    if not isinstance(block, nn.Module):
        return Applied(block, inputs)
    new = {id(own): p for own, p in zip(block.parameters(), parameters, strict=True)}
    places = [
        (module._parameters, name, new[id(own)])
        for module in block.modules()
        for name, own in module._parameters.items()
        if own is not None and new[id(own)] is not own
    ]
    if not places:
        return Applied(block, inputs)

    def f(z: State) -> State:
        with Exchanged(places):
            return block(z, *inputs)

    return f


def _own(layer: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    """``parameters``, and in place of those of the same memory, as a graph passes them on, the block's own: these need
    not be put into it, where other threads would find them."""
    if not isinstance(layer.block, nn.Module):
        return parameters
    return [
        own if _are_same(own, given) else given for own, given in zip(layer.block.parameters(), parameters, strict=True)
    ]


def _are_same(a: Tensor, b: Tensor) -> bool:
    plain = all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in (a, b))
    same = plain and (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
    return same and a.data_ptr() == b.data_ptr()


def _leaf(t: Tensor) -> Tensor:
    """t, or the same as a tensor that a gradient ends at and that has no hooks."""
    if isinstance(t, nn.Parameter) and t.is_leaf and not t._backward_hooks:
        return t
    return t.detach().requires_grad_(_has_gradient(t))


def _has_gradient(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def kind_of(state: State) -> str:
    """As the operators take it: "Tensor", "tuple" or "list"."""
    return "Tensor" if isinstance(state, Tensor) else "list" if isinstance(state, list) else "tuple"


def as_state(parts: list[Tensor], kind: str) -> State:
    return parts[0] if kind == "Tensor" else tuple(parts) if kind == "tuple" else parts


def _as_parts(state: State) -> list[Tensor]:
    return [part.clone(memory_format=torch.contiguous_format) for part in parts_of(state)]


@torch.library.custom_op("deq::equilibrium", mutates_args=())
def equilibrium(
    layer: Tensor,
    seed: Tensor | None,
    modes: str,
    kind: str,
    start: list[Tensor],
    inputs: list[Tensor],
    parameters: list[Tensor],
    moving: list[Tensor],
) -> list[Tensor]:
    """The equilibrium of a registered layer from ``start``, its parts; and what the ``moving`` buffers hold then."""
    module = _layer(layer)
    block, device = module.block, start[0].device
    with included(_EAGER), torch.no_grad(), _in_modes(block, modes), _masks(block, seed, device):
        still = Members([block] if isinstance(block, nn.Module) else []).still()
        with still:
            solution = module.solve(_function(module, inputs, _own(module, parameters)), as_state(start, kind))
    return _as_parts(solution.z) + [buffer.clone() for buffer in moving_of(block)]


@equilibrium.register_fake
def _(layer, seed, modes, kind, start, inputs, parameters, moving):
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in start] + [
        torch.empty_like(buffer) for buffer in moving
    ]


@torch.library.custom_op("deq::equilibrium_backward", mutates_args=())
def equilibrium_backward(
    layer: Tensor,
    seed: Tensor | None,
    modes: str,
    kind: str,
    z: list[Tensor],
    inputs: list[Tensor],
    parameters: list[Tensor],
    moved: list[Tensor],
    g: list[Tensor],
) -> list[Tensor]:
    """Gradients of the inputs and the parameters at the equilibrium z, in contiguous memory, as the compiler was told;
    zeros for those that need none. moved: what the moving buffers held when z was found."""
    module = _layer(layer)
    leaves = [t.detach().requires_grad_(_has_gradient(t)) for t in inputs]
    leaves += map(_leaf, _own(module, parameters))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter([None] * len(wanted))
    if wanted:
        f = _function(module, leaves[: len(inputs)], leaves[len(inputs) :])
        block, device = module.block, z[0].device
        places = [(*place, then) for place, then in zip(_moving_places(block), moved, strict=True)]
        roots = [block] if isinstance(block, nn.Module) else modules_used(block)  # which no graph can look for
        places += [norm.stopped() for root in roots for norm in _torch_norms(root)]
        as_then = Exchanged(places) if places else nullcontext()
        with included(_EAGER), torch.enable_grad(), _in_modes(block, modes), _masks(block, seed, device), as_then:
            parts = parts_of(module.attach(f, as_state(z, kind), wanted))
            used = [(part, v) for part, v in zip(parts, g, strict=True) if part.requires_grad]
            if used:  # else the block uses none of the tensors
                parts, g = zip(*used, strict=True)
                found = iter(torch.autograd.grad(parts, wanted, g, allow_unused=True))
    grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return [
        torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        if grad is None
        else grad.clone(memory_format=torch.contiguous_format)
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


@equilibrium_backward.register_fake
def _(layer, seed, modes, kind, z, inputs, parameters, moved, g):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*inputs, *parameters)]


def _setup_context(ctx, inputs, output):
    layer, seed, ctx.modes, ctx.kind, start, x, parameters, _ = inputs
    ctx.counts = len(start), len(x), len(output)
    ctx.save_for_backward(layer, seed, *output, *x, *parameters)


def _backward(ctx, g):
    n, m, both = ctx.counts
    layer, seed, *saved = ctx.saved_tensors
    z, moved, x, parameters = saved[:n], saved[n:both], saved[both : both + m], saved[both + m :]
    grads = equilibrium_backward(layer, seed, ctx.modes, ctx.kind, z, x, parameters, moved, list(g[:n]))
    grads = [grad if _has_gradient(t) else None for grad, t in zip(grads, (*x, *parameters), strict=True)]
    return None, None, None, None, [None] * n, grads[:m], grads[m:], [None] * (both - n)


equilibrium.register_autograd(_backward, setup_context=_setup_context)
