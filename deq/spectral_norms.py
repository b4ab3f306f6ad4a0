"""Spectral norms of torch, of both kinds: in training every evaluation of their module is a step of power iteration.

One of :func:`torch.nn.utils.parametrizations.spectral_norm` does so where its weight is read, one of
:func:`torch.nn.utils.spectral_norm` in a hook of the module.
"""

import copy
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from .modes import apart_from_autocast

Place = tuple[dict, str, object]


class TorchNorm(NamedTuple):
    """norm: has the number of steps. holder, names: where its vectors are. owner: the module that takes the steps."""

    norm: SpectralNorm | _SpectralNorm
    holder: nn.Module
    names: tuple[str, str]
    owner: nn.Module

    def places(self) -> list[tuple[dict, str]]:
        """Of its vectors."""
        return [(self.holder._buffers, name) for name in self.names]

    def stopped(self) -> Place:
        """Of a hook in a copy: replicas of DataParallel share it, in threads of their own."""
        if not isinstance(self.norm, SpectralNorm):
            return self.norm.__dict__, "n_power_iterations", 0
        hooks = self.owner._forward_pre_hooks
        others = OrderedDict((key, _stopped(hook)) for key, hook in hooks.items())
        return self.owner.__dict__, "_forward_pre_hooks", others

    @property
    def moves(self) -> bool:
        """Not inside of another layer, where it is stopped."""
        return self.norm.n_power_iterations > 0

    def moved(self) -> list[Place]:
        """Takes the step of one call: where no further one is taken, and the vectors are copies that nobody moves."""
        if self.moves:
            with torch.no_grad(), apart_from_autocast(self.holder._buffers[self.names[0]].device.type):
                if isinstance(self.norm, SpectralNorm):
                    self.norm.compute_weight(self.owner, do_power_iteration=True)
                else:
                    self.owner()
        return [self.stopped(), *((place, name, place[name].clone()) for place, name in self.places())]


def _stopped(hook: object) -> object:
    if isinstance(hook, SpectralNorm):
        hook = copy.copy(hook)
        hook.n_power_iterations = 0
    return hook


def norms_of(module: nn.Module) -> list[TorchNorm]:
    """Those that take a step when ``module`` is evaluated in training."""
    found = []
    if module._forward_pre_hooks:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                found.append(TorchNorm(hook, module, (f"{hook.name}_u", f"{hook.name}_v"), module))
    elif isinstance(module, ParametrizationList):
        for norm in module:
            if isinstance(norm, _SpectralNorm) and norm._buffers:  # a vector's has none
                found.append(TorchNorm(norm, norm, ("_u", "_v"), module))
    return found
