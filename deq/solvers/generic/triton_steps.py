"""The steps of :mod:`.torch_steps` with Anderson's history in Triton (kernels/history.py): GPU tensors.

All that is wide is two kernels an evaluation besides f; numbers of a sample stay torch operators, and on the device.
"""

import torch
from torch import Tensor

from ... import _triton
from .rule import Rule
from .torch_steps import TorchSteps


def serves(y: Tensor, rule: Rule) -> bool:
    """Whether this solve can use the kernels."""
    return y.is_cuda and rule.method in ("anderson", "auto") and _triton.why_not_launch() == ""


class TritonSteps(TorchSteps):
    """As TorchSteps."""

    def _remember(self, fy: Tensor, pushing: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        from ...kernels import history

        self.pairs = self.count
        slot = self._next_slot(pushing)
        slots = torch.where(pushing, slot, -1)
        y = self.y.contiguous()  # of an f whose values lie column by column the points do too
        norms, dots = history.measure(y, fy.resolve_neg().contiguous(), self.F, self.G, slots)
        self._enter(slot, dots, pushing)
        return norms.unbind(1)

    def _combine(self, a: Tensor, mixing: Tensor, after: Tensor) -> Tensor:
        from ...kernels import history

        residual_weights = None if self.rule.damping == 1.0 else (self.rule.damping - 1) * a
        after = after.clone(memory_format=torch.contiguous_format)
        return history.mix(self.F, self.G, a, residual_weights, mixing, after)
