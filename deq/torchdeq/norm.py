"""torchdeq's normalisation by torch parametrisations: :mod:`deq.nn.normalisation` under its old names."""

from collections.abc import Sequence

from torch import nn

from ..nn.normalisation import MODULES, Normalised, denormalise, normalise_layer
from .arguments import gather, refuse

_KINDS = {"weight_norm": "weight", "spectral_norm": "spectral"}
_OWN = ("learn_scale", "target_norm", "clip", "clip_value", "n_power_iterations", "names", "dims")
_custom: dict[str, type] = {}
_modules: dict[str, dict[type, tuple[str, int]]] = {name: dict(MODULES) for name in _KINDS}


def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: Sequence[str] | str | None = None,
    filter_out: Sequence[str] | str | None = None,
    args=None,
    **norm_kwargs,
) -> None:
    """Normalise the weights of the layers of ``model`` in place.

    norm_type: "weight_norm", "spectral_norm", "none" or one that was registered; ``args.norm_type`` wins over it.
    prefix_filter_out, filter_out: layers whose name begins with, or contains, one of these are left out. args: options
    as for get_deq (norm_no_scale, norm_clip, norm_clip_value, norm_target_norm, sn_n_power_iters). norm_kwargs: the
    same under the names learn_scale, clip, clip_value, target_norm, n_power_iterations. A registered norm is given all
    of both.
    """
    config = gather("apply_norm", args, norm_kwargs, None)
    norm_type = config.get("norm_type", norm_type)
    if norm_type not in _custom:
        config = gather("apply_norm", args, norm_kwargs, _OWN)
    if norm_type == "none":
        return
    if norm_type not in (*_KINDS, *_custom):
        refuse("apply_norm", "norm_type", norm_type, ("none", *_KINDS, *_custom))
    prefixes, parts = _listed(prefix_filter_out), _listed(filter_out)
    learned = not config.get("norm_no_scale", not config.get("learn_scale", True))
    clip = config.get("norm_clip_value", config.get("clip_value", 1.0))
    options = {
        "learned": learned,
        "target": config.get("norm_target_norm", config.get("target_norm", 1.0)),
        "clip": clip if config.get("norm_clip", config.get("clip", False)) else None,
        "iterations": config.get("sn_n_power_iters", config.get("n_power_iterations", 1)),
    }
    done: Normalised = {}
    for name, module in list(model.named_modules()):
        if name.startswith(tuple(prefixes)) or any(part in name for part in parts):
            continue
        if norm_type in _custom and type(module) in _custom[norm_type]._target_modules:
            module._deq_norm = _custom[norm_type].apply(module, deq_args=config, **norm_kwargs)
        elif norm_type in _KINDS and type(module) in _modules[norm_type]:
            names, dims = _modules[norm_type][type(module)]
            names, dims = config.get("names", names), config.get("dims", dims)
            for weight, dim in zip(_listed(names), [dims] if isinstance(dims, int) else dims, strict=True):
                normalise_layer(module, weight, dim, _KINDS[norm_type], **options, done=done)


def reset_norm(model: nn.Module) -> None:
    """Compute registered norms anew. deq's own need no reset: a weight is computed when a solve first reads it."""
    for module in model.modules():
        if hasattr(module, "_deq_norm"):
            module._deq_norm(module)


def remove_norm(model: nn.Module) -> None:
    """Make the normalised weights plain parameters again."""
    denormalise(model)
    for module in model.modules():
        if hasattr(module, "_deq_norm"):
            module._deq_norm.remove(module)
            del module._deq_norm


def register_norm(norm_type: str, norm_class: type) -> None:
    """Make a class with torchdeq's interface (``apply``, ``__call__``, ``remove``, ``_target_modules``) known."""
    _custom[norm_type] = norm_class


def register_norm_module(module_class: type[nn.Module], norm_type: str, names: str = "weight", dims: int = 0) -> None:
    """Let apply_norm normalise the parameter ``names`` of ``module_class`` too, its outputs along ``dims``."""
    if norm_type in _custom:
        _custom[norm_type]._target_modules[module_class] = (names, dims)
    elif norm_type in _KINDS:
        _modules[norm_type][module_class] = (names, dims)
    else:
        refuse("register_norm_module", "norm_type", norm_type, (*_KINDS, *_custom))


def _listed(names: Sequence[str] | str | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)
