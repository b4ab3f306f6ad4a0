"""Weight and spectral normalisation of a whole model, as torch parametrisations.

``W = W' min(clip, target / ||W'||)``: computed when it is read, once a solve (torch caches it there), so that nothing
has to be reset between training steps; state dicts, copies and pickles are torch's own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..closures import in_transform, outside_of_gradients
from ..members import Unsteady
from .equilibrium_linear import Injection

# The weight's name and its output dimension.
MODULES: dict[type[nn.Module], tuple[str, int]] = {
    nn.Linear: ("weight", 0),
    Injection: ("weight", 0),
    nn.Conv1d: ("weight", 0),
    nn.Conv2d: ("weight", 0),
    nn.Conv3d: ("weight", 0),
    nn.ConvTranspose1d: ("weight", 1),
    nn.ConvTranspose2d: ("weight", 1),
    nn.ConvTranspose3d: ("weight", 1),
}
KINDS = ("weight", "spectral")
# Weights, by number, with what computes them now.
Normalised = dict[int, tuple[nn.Parameter, parametrize.ParametrizationList]]


class _Normalised(nn.Module):
    """What both have in common: the factor of a weight of norm ``size``."""

    def __init__(self, learned: bool, target: float, clip: float | None):
        super().__init__()
        self.learned, self.target, self.clip = learned, target, clip

    def factor(self, size: Tensor, scale: Tensor | float) -> Tensor:
        factor = scale / torch.where(size > 0, size, 1.0)
        return factor if self.clip is None else factor.clamp(max=self.clip)


class WeightNorm(_Normalised):
    """Every slice of the weight along ``dim`` has norm g, learned, or ``target`` (Salimans and Kingma 2016)."""

    def __init__(self, dim: int, learned: bool, target: float, clip: float | None):
        super().__init__(learned, target, clip)
        self.dim = dim

    def _size(self, v: Tensor) -> Tensor:
        others = [d for d in range(v.dim()) if d != self.dim]
        return torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()

    def forward(self, v: Tensor, g: Tensor | None = None) -> Tensor:
        return v * self.factor(self._size(v), g if self.learned else self.target)

    def right_inverse(self, weight: Tensor):
        return (weight, self._size(weight)) if self.learned else weight


class SpectralNorm(_Normalised):
    """The weight as a matrix (outputs, rest) has 2-norm ``target``, or 2-norm 1 before its rows are scaled by g.

    The norm is estimated by power iteration: ``iterations`` of them whenever training reads it, and at the start enough
    to be right from the first forward pass on (Miyato et al. 2018).
    """

    def __init__(self, weight: Tensor, dim: int, learned: bool, target: float, clip: float | None, iterations: int):
        super().__init__(learned, target, clip)
        self.dim, self.iterations = dim, iterations
        self._moves_buffers = True  # a backward pass that comes after the next forward pass has those of its own
        matrix = self._matrix(weight.detach())
        for name, size in zip(("u", "v"), matrix.shape, strict=True):
            side = matrix.new_empty(size)
            self.register_buffer(name, _direction(torch.randn_like(side), torch.zeros_like(side)))
        self._iterate(matrix, 30)

    def __new__(cls, *args, **kwargs):
        Unsteady.exist = True
        return super().__new__(cls)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0).flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, iterations: int) -> None:
        for _ in range(iterations):
            _put(_direction(matrix.mT @ self.u, self.v), self.v)
            _put(_direction(matrix @ self.v, self.u), self.u)

    def forward(self, weight: Tensor, g: Tensor | None = None) -> Tensor:
        matrix = self._matrix(weight)
        # A backward pass reads the weight as it was; one of a graph does not read it again, and could not ask.
        if self.training and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
            numbers = matrix.detach()
            numbers = numbers if torch.compiler.is_compiling() else outside_of_gradients(numbers)
            self._iterate(numbers, self.iterations)
        size = self.u.clone() @ (matrix @ self.v.clone())
        return weight * self.factor(size, g if self.learned else self.target)

    def right_inverse(self, weight: Tensor):
        if not self.learned:
            return weight
        shape = [1] * weight.dim()
        shape[self.dim] = weight.shape[self.dim]
        return weight, torch.full(shape, self.target, dtype=weight.dtype, device=weight.device)


def _direction(x: Tensor, before: Tensor) -> Tensor:
    """x (n,) with norm 1; ``before`` where x is zero or not finite, as a weight that starts at zero makes it."""
    if x.numel() == 0:  # which has no largest element
        return x
    size = x.abs().amax()
    usable = (size > 0) & torch.isfinite(size)
    x = x / torch.where(usable, size, 1.0)  # squares of x may be beyond its dtype
    return torch.where(usable, x / torch.linalg.vector_norm(x), before)


def _put(new: Tensor, buffer: Tensor) -> None:
    """By copy_, which the gradients of torch.func refuse into a tensor from outside of them; out= they let pass."""
    is_outside = not torch.compiler.is_compiling() and in_transform()
    if is_outside and not torch._C._functorch.is_functorch_wrapped_tensor(buffer):
        torch.mul(new, 1, out=buffer)
    else:
        buffer.copy_(new)


def normalise(
    model: nn.Module,
    kind: str = "weight",
    *,
    skip: Sequence[str] | str = (),
    learned: bool = True,
    target: float = 1.0,
    clip: float | None = None,
    iterations: int = 1,
) -> nn.Module:
    """Normalise the weights of all linear and convolutional layers of ``model`` in place, and return it.

    kind: "weight" or "spectral". skip: layers whose name contains one of these, or this one, are left out. learned:
    whether the norm is a parameter that starts at the weight's own ("spectral": at ``target``); else it is ``target``.
    clip: bound of the factor that a weight is multiplied by. iterations: of the spectral norm in every training step.
    Layers that share a weight go on sharing it, and its norm. Raises ValueError, with nothing changed, where a weight
    is computed by a hook.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    skip = [skip] if isinstance(skip, str) else skip
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in MODULES and not any(part in name for part in skip)
    ]
    for name, module in layers:  # before the first one is changed
        weight = MODULES[type(module)][0]
        if weight not in module._parameters and weight not in module._buffers:
            raise ValueError(
                f"model must have weights that are parameters; that of {name or 'the layer'!r} is computed by a hook, "
                "as of torch.nn.utils.prune or the old weight_norm and spectral_norm: remove it, or skip the layer"
            )
    done: Normalised = {}
    for _, module in layers:
        normalise_layer(module, *MODULES[type(module)], kind, learned, target, clip, iterations, done)
    return model


def normalise_layer(
    module: nn.Module,
    name: str,
    dim: int,
    kind: str,
    learned: bool,
    target: float,
    clip: float | None,
    iterations: int,
    done: Normalised,
) -> None:
    """:func:`normalise` for one layer's parameter ``name``, whose outputs lie along ``dim``. done: those before."""
    weight = getattr(module, name)
    if kind == "weight":
        norm: nn.Module = WeightNorm(dim, learned, target, clip)
    else:
        norm = SpectralNorm(weight, dim, learned, target, clip, iterations)
    parametrize.register_parametrization(module, name, norm)
    own = module.parametrizations[name]
    if learned and isinstance(weight, nn.Parameter):
        own.original0 = weight  # not another parameter of the same memory, as torch makes it
    first = done.setdefault(id(weight), (weight, own))[1]
    if first is not own and first[0].dim == own[0].dim:  # tensors are shared, not modules: functional_call breaks these
        for part, tensor in first.named_parameters(recurse=False):
            setattr(own, part, tensor)
        own.load_state_dict(first.state_dict())


def denormalise(model: nn.Module) -> nn.Module:
    """Make every normalised weight of ``model`` a plain parameter again, with the value it has."""
    plain: dict[tuple[nn.Parameter, ...], nn.Parameter] = {}  # by what it was made of
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                normalised = module.parametrizations[name]
                if isinstance(normalised[0], _Normalised):
                    parts = tuple(normalised.parameters(recurse=False))
                    if parts in plain:  # another layer's weight as well
                        module.parametrizations[name] = parametrize.ParametrizationList([nn.Identity()], plain[parts])
                    _give_own_class(module)
                    with torch.inference_mode(False), torch.enable_grad():  # else torch makes it a buffer
                        parametrize.remove_parametrizations(module, name)
                    if parts and name in module._buffers:  # and so it does where all of them are frozen
                        frozen = nn.Parameter(module._buffers.pop(name), requires_grad=False)
                        module.register_parameter(name, frozen)
                    plain[parts] = getattr(module, name)
    return model


def _give_own_class(module: nn.Module) -> None:
    """Copies share the class that torch made for a parametrised module, and would lose the weight that it loses."""
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)
