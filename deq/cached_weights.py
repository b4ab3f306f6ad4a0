"""What torch.nn.utils.parametrize caches: a solve has its own, for its thread alone, and callers have theirs."""

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.utils import parametrize


class OfThread(threading.local):
    """Of this thread: whether it evaluates a function for deq, and the weights of its solve, None outside of one."""

    evaluates = False
    weights: dict | None = None


_lock, of_thread = threading.Lock(), OfThread()
# By how many of all threads' evaluations torch's count is above that of callers. Never less, at any moment: a thread
# that reads both would take another's evaluation for a caller that caches.
_entered = 0


class CachedWeights:
    """torch.nn.utils.parametrize.cached for this thread alone: torch's would hand a weight that was computed without a
    gradient to a thread that trains. As no generator it takes 20 us less where caches are cold.

    What callers have cached is not used meanwhile: a backward pass that comes when their context is over would not find
    it again. keeps: whether weights are computed once; False, outside of a solve, whenever they are read.

    Ctrl-C may come where Python calls ``__exit__``, and nothing would be left: who keeps weights puts back what
    ``of_thread`` has, by itself, or every later solve would go on with them.
    """

    def __init__(self, keeps: bool = True):
        self._keeps = keeps

    def __enter__(self) -> None:
        global _entered
        self._before = of_thread.evaluates, of_thread.weights
        of_thread.evaluates = True
        if self._keeps and of_thread.weights is None:
            of_thread.weights = {}
        with _lock:
            _entered += 1
            parametrize._cache_enabled += 1
            if type(parametrize._cache) is not _Cache:
                parametrize._cache = _Cache(parametrize._cache)

    def __exit__(self, *_) -> None:
        global _entered
        of_thread.evaluates, of_thread.weights = self._before
        with _lock:
            parametrize._cache_enabled -= 1
            if not parametrize._cache_enabled:
                parametrize._cache = {}
            _entered -= 1


def uncached() -> AbstractContextManager:
    """While active, nothing that callers have cached is used."""
    return CachedWeights(keeps=False) if parametrize._cache_enabled > _entered else nullcontext()


def are_weights_kept() -> bool:
    """Whether the solve that is under way has computed weights that it does not compute again."""
    return bool(of_thread.weights)


class _Cache(dict):
    """In place of torch's: of a thread that evaluates a function for deq its own weights; else those of callers, which
    are its items, as long as one of them caches any.

    A weight that belongs to a gradient of torch.func, which an evaluation of the solve may be inside of, is not kept:
    the next evaluation is inside of another one, or of none.
    """

    def get(self, key, default=None):
        weights = self._weights()
        weight = default if weights is None else dict.get(weights, key, default)
        return default if of_thread.evaluates and _belongs_to_gradient(weight) else weight

    def __setitem__(self, key, value) -> None:
        weights = self._weights()
        if weights is not None and not (of_thread.evaluates and _belongs_to_gradient(value)):
            dict.__setitem__(weights, key, value)

    def _weights(self) -> dict | None:
        if of_thread.evaluates:
            return of_thread.weights
        if parametrize._cache_enabled > _entered:
            return self
        self.clear()
        return None


def _belongs_to_gradient(weight: object) -> bool:
    """Whether it is a tensor of transforms of which one is, or may be, torch.func.vjp or jvp."""
    if weight is None or not torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return False
    active = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() != torch._C._functorch.TransformType.Vmap for interpreter in active)
