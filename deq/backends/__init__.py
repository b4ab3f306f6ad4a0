"""One small module a backend, all with the same five functions.

Every tensor is canonical: W, A (m, m) with c, z0, z, g, d, u (B, m), or W, A (S, m, m) with the others (S, B, m); any
strides, one dtype and device.

``solve(W, c, z0, activation, plan) -> Outcome``
    fixed point of ``act(W z + c)``, from zero if z0 is None
``masked_linear(A, g, d, value_of, plan, out=None) -> Outcome``
    fixed point of ``d * (A u + g)``; with ``value_of`` naming an activation, d holds its values, not its derivative
``evaluate(W, c, z, activation) -> Tensor``
    ``act(W z + c)``, float32 or float64, NaN in a row that is not finite; on the CPU to the last bit the same whichever
    rows are beside a row, which torch's products and functions do not promise
``derivative(W, c, z, activation) -> Tensor``
    ``act'(W z + c)``
``outer(u, z) -> Tensor``
    the sum over B of ``u z^T``, (m, m) or (S, m, m)

A non-finite ``g`` gives NaN for its sample; any other non-finite input is named in ``Outcome.report``.
"""

import importlib
from types import ModuleType

from . import cpu, reference
from .outcome import Counted, Deferred, Outcome, Settled

__all__ = ["Counted", "Deferred", "Outcome", "Settled", "get_backend", "load"]

_MODULES: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}

# The module of a backend that deq.plan.make_plan chose, by name; asked three times in a step, so no function of Python.
get_backend = _MODULES.__getitem__


def load(name: str) -> None:
    """Import a backend that is not always there, or takes a second to import, before it is planned with."""
    if name not in _MODULES:
        _MODULES[name] = importlib.import_module(f".{name}", __name__)
