"""Counts what runs: operators, FLOPs by precision, bytes by model, host reads, and the memory of tensors."""

import ctypes
from collections import Counter as Tally
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from .. import _library
from ..plan import INCREMENTS

aten = torch.ops.aten
# Operators whose result the host waits for; on a GPU each is a synchronisation.
HOST_READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal}
# They make no element: their output is their input seen in another way, or memory not yet written.
FREE = {aten.detach, aten.alias, aten.empty_like, aten.new_empty, aten.empty, aten.empty_strided, aten.resize_}
_PRECISION = {number: name for name, number in INCREMENTS.items()}
# Name: rows of a mask that an evaluation reads, and which argument is the precision.
_ENGINE = {"deq.solve_": (0, 12), "deq.masked_linear_": (1, 13)}
# Bytes an element that a row moves in one evaluation: z and c in, f(z) out; and for increments y and x in and out,
# with the increments themselves, one in and one out.
_NATIVE_ROW, _INCREMENT_ROW = 3, 4


class Work(ctypes.Structure):
    """DeqWork of csrc/kernels.h: what the calling thread's last solve multiplied."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "native_rows",
            "native_products",
            "native_sweeps",
            "increment_rows",
            "correction_rows",
            "increment_sweeps",
            "correction_sweeps",
        )
    )

    @classmethod
    def last(cls) -> "Work":
        work = cls()
        _library.compiled.deq_cpu_last_work(ctypes.addressof(work))
        return work


@dataclass
class Counts:
    """What one pass did.

    flops: useful FLOPs, the formulas of :mod:`deq.profiling.flops` and of torch; by_operator: the same by name.
    executed: FLOPs that were carried out, by precision: without products with zeros that the engine skipped, with the
        corrections that it added. rows: products of one sample's vector with W, by precision.
    bytes: moved between the processor and memory or cache, by the model of :class:`Counter`.
    operators: calls by name, views left out. host_reads: those whose result the host reads.
    peak, retained: bytes of tensors made inside that were alive at most, and at the end.
    """

    by_operator: Tally = field(default_factory=Tally)
    executed: Tally = field(default_factory=Tally)
    rows: Tally = field(default_factory=Tally)
    operators: Tally = field(default_factory=Tally)
    bytes: int = 0
    host_reads: int = 0
    peak: int = 0
    retained: int = 0

    @property
    def flops(self) -> int:
        return sum(self.by_operator.values())


class Counter(TorchDispatchMode):
    """Inside it every operator is counted into ``counts``.

    Bytes: an operator reads its inputs and writes its outputs once. A solve reads W once a sweep (all rows of a tile
    take one sweep together), in the precision that it multiplies, and moves three vectors a row and evaluation (z and c
    in, f(z) out), of increments four of four bytes and two increments.
    """

    def __init__(self, live: "Live | None" = None):
        super().__init__()
        self.counts = Counts()
        self.live = Live() if live is None else live

    def __exit__(self, *error):
        self.counts.retained, self.counts.peak = self.live.settle(), self.live.peak
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function._overloadpacket
        if packet not in flop_registry and function is not torch.ops.prim.device.default:
            with self:
                result = function.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        out = function(*args, **kwargs)
        self._count(function, packet, args, kwargs, out)
        return out

    def _count(self, function, packet, args, kwargs, out) -> None:
        outputs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        self.live.see(outputs, inputs)
        if function.is_view or packet in FREE:
            return
        counts, name = self.counts, str(packet)
        counts.operators[name] += 1
        copies_to_host = packet is aten._to_copy and any(not t.is_cpu for t in inputs) and outputs[0].is_cpu
        counts.host_reads += packet in HOST_READS or copies_to_host
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        if flops:
            counts.by_operator[name] += flops
        if name in _ENGINE:
            self._engine(args, *_ENGINE[name])
            return
        out_names = {argument.name for argument in function._schema.arguments if argument.is_out}  # written, not read
        read = tree_iter((args, {name: value for name, value in kwargs.items() if name not in out_names}))
        counts.bytes += sum(_bytes(part) for t in (*read, *outputs) if isinstance(t, Tensor) for part in _parts(t))
        if flops:
            precision = str(inputs[0].dtype).removeprefix("torch.")
            counts.executed[precision] += flops

    def _engine(self, args, mask: int, precision_at: int) -> None:
        W, c = args[0], args[1]
        m, work, counts = W.shape[-1], Work.last(), self.counts
        native = "float64" if c.dtype == torch.float64 else "float32"
        size = 8 if native == "float64" else 4
        rows = {native: work.native_rows}
        counts.executed[native] += 2 * work.native_products
        counts.bytes += work.native_sweeps * m * m * size + work.native_rows * (_NATIVE_ROW + mask) * m * size
        low_rows = work.increment_rows + work.correction_rows
        if low_rows:
            precision = _PRECISION[int(args[precision_at])]
            element = 1 if precision == "int8" else 2
            rows[precision] = low_rows
            counts.executed[precision] += 2 * m * m * low_rows
            sweeps = work.increment_sweeps + work.correction_sweeps
            counts.bytes += sweeps * m * m * element + low_rows * m * ((_INCREMENT_ROW + mask) * 4 + 2 * element)
        counts.rows.update({precision: n for precision, n in rows.items() if n})
        samples = c.numel() // m
        counts.bytes += 2 * samples * m * c.element_size()  # every injection is read from, every z written to memory


def _parts(t: Tensor) -> tuple[Tensor, ...]:
    """What holds the elements of t: itself, or the indices and values of a sparse tensor, which has no storage."""
    if t.layout == torch.sparse_coo:
        return t._indices(), t._values()
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return t.crow_indices(), t.col_indices(), t.values()
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return t.ccol_indices(), t.row_indices(), t.values()
    return (t,)


def _bytes(t: Tensor) -> int:
    """Of the elements that t shows; an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else 1
    return elements * t.element_size() if t.numel() else 0


class Live:
    """Bytes of the tensors made under it that are still alive, and the most that there were.

    A storage that an operator was given and did not make belongs to somebody else. What an operator frees before it
    returns is not seen.
    """

    def __init__(self):
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = self.peak = 0

    def see(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        self.settle()
        given = {part.untyped_storage()._cdata for t in inputs for part in _parts(t)}
        for part in (part for t in outputs for part in _parts(t)):
            storage = part.untyped_storage()
            key = storage._cdata  # cannot be that of another storage while the reference is held
            if key not in given and key not in self._alive:
                self._alive[key] = StorageWeakRef(storage), storage.nbytes()
                self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)

    def settle(self) -> int:
        """Forget what has been freed; the bytes that are left."""
        for key in [key for key, (reference, _) in self._alive.items() if reference.expired()]:
            self.bytes -= self._alive.pop(key)[1]
        return self.bytes
