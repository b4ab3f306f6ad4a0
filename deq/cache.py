"""Remembers what was derived from a weight (an inverse, a factorisation) and finds it again by the weight's content.

The key is a 128-bit fingerprint of the elements, not an address or a version counter: writing through ``.data``, views,
freed and reused memory can never bring back what belongs to old weights. Reading W once is what a hit costs.

On a GPU nobody waits for a fingerprint: there the key is the tensor itself and its version counter, which every write
but one through ``.data`` advances, and each stream has values of its own: another's may not be there yet. Who uses such
a value must judge what comes of it by W.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _library
from .modes import is_captured

T = TypeVar("T")

BUDGET_BYTES = 256 << 20
ALWAYS_KEPT = 4  # the most recently used entries stay however large they are
MOST_KEPT = 256  # entries: a key and its bookkeeping take 0.5 to 2 KB, whatever the value

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_lock = threading.Lock()
_entries: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()  # key: (value, bytes); most recently used last
_by_tensor: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor: {what: (version, value)}
_captured: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensors that CUDA graphs work with
_held = 0  # bytes of all entries


def remembered(W: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it returned when last called for a tensor of the content of W under the name ``what``.

    W: any floating tensor; strides and address do not matter, shape, dtype and every bit of its elements do.
    make: a pure function of W and ``what``, run without gradients. What it returns (a tensor, or tuples, lists and
        dicts of tensors) is shared between callers: nobody may write into it.

    At most ``BUDGET_BYTES`` and ``MOST_KEPT`` entries are held, and always the last ``ALWAYS_KEPT`` entries. Thread
    safe; two threads that miss together both call ``make``. Nothing is remembered where the content cannot be read:
    without the compiled library, on other devices than CPUs and GPUs, inside torch.func transforms, torch.compile and
    the capture of a CUDA graph, for subclasses of Tensor.
    """
    if is_captured(W):
        forget_captured(W)
    elif W.is_cuda and is_plain(W) and not W.is_inference() and W not in _captured:
        return by_version(W, what, make)
    key = _key(W, what)
    if key is None:
        with torch.no_grad():
            return make()
    with _lock:
        if key in _entries:
            _entries.move_to_end(key)
            return _entries[key][0]
    # An inference tensor could never be saved for a backward pass later on.
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    global _held
    with _lock:
        _held -= _entries.pop(key, (None, 0))[1]
        _entries[key] = value, _bytes(value)
        _held += _entries[key][1]
        while len(_entries) > (ALWAYS_KEPT if _held > BUDGET_BYTES else MOST_KEPT):
            _held -= _entries.popitem(last=False)[1][1]
    return value


def by_version(W: Tensor, what: Hashable, make: Callable[[], T]) -> T:
    """:func:`remembered` for as long as the tensor W lives and is not written to."""
    what = what, _stream_of(W)
    with _lock:
        known = _by_tensor.setdefault(W, {}).get(what)
    if known is not None and known[0] == W._version:
        return known[1]
    version = W._version
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    with _lock:
        known_of_W = _by_tensor.setdefault(W, {})
        for outdated in [key for key, (other, _) in known_of_W.items() if other != version]:
            del known_of_W[outdated]  # of streams that may never come again
        known_of_W[what] = version, value
    return value


def forget_captured(W: Tensor) -> None:
    """Remember nothing of W any more: a replay of the CUDA graph that is captured may write to it, as a training step
    does, and its version will not tell."""
    if is_plain(W):
        with _lock:
            _captured[W] = True
            _by_tensor.pop(W, None)


def _stream_of(W: Tensor) -> int:
    """The stream that is current on the GPU of W; 0 elsewhere."""
    return torch.cuda.current_stream(W.device).cuda_stream if W.is_cuda else 0


def is_plain(W: Tensor) -> bool:
    """Whether W is a tensor of its own, and neither traced nor transformed."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(W) in (Tensor, torch.nn.Parameter)


def clear() -> int:
    """Forget everything; returns the bytes that were held, without those of GPUs."""
    global _held
    with _lock:
        forgotten, _held = _held, 0
        _entries.clear()
        _by_tensor.clear()
    return forgotten


def held() -> int:
    """Bytes that are remembered."""
    return _held


def _key(W: Tensor, what: Hashable) -> Hashable | None:
    """None where the content of W cannot be read."""
    if not is_plain(W) or _library.compiled is None:
        return None
    if W.device.type != "cpu" or W.layout != torch.strided or W.dtype not in _DTYPES:
        return None
    matrix = W.detach()
    if matrix.dim() > 3:
        matrix = matrix.flatten(0, -3)
    while matrix.dim() < 2:
        matrix = matrix.unsqueeze(0)
    if 1 not in matrix.stride()[-2:] and 1 not in matrix.shape[-2:]:
        matrix = matrix.contiguous()
    fingerprint = torch.empty(2, dtype=torch.int64, device="cpu")
    torch.ops.deq.fingerprint.default(matrix, fingerprint)
    return what, W.shape, W.dtype, *fingerprint.tolist()


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0
