"""``deq bench constants``: the numbers of deq/gpu_constants.json that can be measured from torch and Triton.

A measurement is a function under ``@measures(name)``. Barriers between blocks and rates of mma.sync are measured by the
compiled library, where it has CUDA kernels (csrc/cuda/constants.cu). What none is registered for stays as it is in the
table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

from deq import _library
from deq.backends import cuda
from deq.gpu_device import Device, device_at, find_device, key_of, table, write_table
from deq.gpu_times import LATENCY, PRECISIONS, grid_tiles, grid_time

from .device import capture, clock, device_seconds
from .record import device_name, environment, write

REPEATS = 7
MEASUREMENTS: dict[str, tuple[Callable[["Sizes"], float], str]] = {}


@dataclass(frozen=True)
class Sizes:
    """Where to measure, and how large."""

    device: torch.device
    copy: int = 2**30  # bytes, far more than any cache
    cached: int = 8 * 2**20  # bytes, a part of the L2 cache
    product: int = 8192  # width of square matrices
    chain: int = 400  # dependent kernels
    calls: int = 20

    @classmethod
    def small(cls) -> "Sizes":
        """For the CPU, where the numbers mean nothing."""
        return cls(torch.device("cpu"), copy=2**16, cached=2**12, product=32, chain=4, calls=2)


def measures(name: str, how: str) -> Callable[[Callable[[Sizes], float]], Callable[[Sizes], float]]:
    """Register a function that measures a number of the table; ``how`` is what the table says of its source."""

    def register(function: Callable[[Sizes], float]) -> Callable[[Sizes], float]:
        MEASUREMENTS[name] = function, how
        return function

    return register


def _median(run: Callable[[], object], sizes: Sizes) -> float:
    return float(np.median([device_seconds(run, sizes.device, sizes.calls) for _ in range(REPEATS)]))


@measures("copy", "device-to-device copy of 1 GiB, read and written bytes")
def copy_rate(sizes: Sizes) -> float:
    source, target = torch.zeros(2, sizes.copy, dtype=torch.uint8, device=sizes.device)
    return 2 * sizes.copy / _median(lambda: target.copy_(source), sizes)


@measures("l2", "copies of 8 MiB in a graph, read and written bytes")
def l2_rate(sizes: Sizes) -> float:
    source, target = torch.zeros(2, sizes.cached, dtype=torch.uint8, device=sizes.device)

    def back_and_forth() -> None:
        for _ in range(sizes.chain // 2):
            target.copy_(source)
            source.copy_(target)

    per_copy = _median(capture(back_and_forth, sizes.device), sizes) / (2 * (sizes.chain // 2))
    return 2 * sizes.cached / max(per_copy - graph_kernel(sizes), 0.1 * per_copy)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def product_rate(dtype: torch.dtype, sizes: Sizes, tf32: bool = False) -> float:
    """FLOP/s of a square product of random numbers: zeros would draw less power and run faster."""
    n = sizes.product
    a, b = (torch.randn(n, n, device=sizes.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with _tf32(tf32):
        return 2 * n**3 / _median(lambda: torch.mm(a, b, out=out), sizes)


@measures("matmul_bfloat16", "8192^3 by cuBLAS on random data")
def bfloat16_rate(sizes: Sizes) -> float:
    return product_rate(torch.bfloat16, sizes)


@measures("matmul_tf32", "8192^3 by cuBLAS on random data")
def tf32_rate(sizes: Sizes) -> float:
    return product_rate(torch.float32, sizes, tf32=True)


@measures("matmul_float32", "8192^3 by cuBLAS on random data")
def float32_rate(sizes: Sizes) -> float:
    return product_rate(torch.float32, sizes)


@measures("matmul_float64", "8192^3 by cuBLAS on random data")
def float64_rate(sizes: Sizes) -> float:
    return product_rate(torch.float64, sizes)


@measures("matmul_float8", "8192^3, e4m3, by cuBLASLt on random data")
def float8_rate(sizes: Sizes) -> float:
    n = sizes.product
    a, b = (torch.randn(n, n, device=sizes.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=sizes.device)
    run = lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    return 2 * n**3 / _median(run, sizes)


@measures("graph_kernel", "a chain of dependent one-element additions in a graph")
def graph_kernel(sizes: Sizes) -> float:
    x = torch.zeros(1, device=sizes.device)

    def chain() -> None:
        for _ in range(sizes.chain):
            x.add_(1)

    return _median(capture(chain, sizes.device), sizes) / sizes.chain


@measures("graph_launch", "replay of a graph of one kernel until it is done")
def graph_launch(sizes: Sizes) -> float:
    x = torch.zeros(1, device=sizes.device)
    return _by_clock(capture(lambda: x.add_(1), sizes.device), sizes)


@measures("eager_op", "an eager one-element addition, queued")
def eager_op(sizes: Sizes) -> float:
    x = torch.zeros(1, device=sizes.device)

    def chain() -> None:
        for _ in range(sizes.chain):
            x.add_(1)

    return _by_clock(chain, sizes) / sizes.chain


@measures("item", "an eager addition and .item(), less the addition")
def item(sizes: Sizes) -> float:
    x = torch.zeros(1, device=sizes.device)
    whole = _by_clock(lambda: x.add_(1).item(), sizes)
    return max(whole - eager_op(sizes), 0.1 * whole)


def _by_clock(run: Callable[[], object], sizes: Sizes) -> float:
    read, samples = clock(sizes.device), []
    run()
    for _ in range(REPEATS * sizes.calls):
        start = read()
        run()
        samples.append(read() - start)
    return float(np.median(samples))


@triton.jit
def _reductions(x_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    place = x_ptr + tl.arange(0, BLOCK)
    x = tl.load(place)
    n = 0
    while n < COUNT:
        x = x * 0.5 + tl.sum(x * x, axis=0)  # each needs the one before
        n += 1
    tl.store(place, x)


@measures("block_reduction", "dependent sums of 1024 numbers over a block of 8 warps")
def block_reduction(sizes: Sizes) -> float:
    x = torch.zeros(1024, device=sizes.device)
    count = 10 * sizes.chain
    many, none = (lambda n=n: _reductions[(1,)](x, COUNT=n, BLOCK=1024, num_warps=8) for n in (count, 0))
    for run in (many, none):
        run()  # compiles
    return max(_median(many, sizes) - _median(none, sizes), 1e-9) / count


def by_library(name: str) -> float:
    """Seconds, bytes or FLOP per second that the library's CUDA code measures (csrc/cuda_kernels.h says what there is).

    Raises RuntimeError where the library has none or it fails.
    """
    if not hasattr(_library.compiled, "deq_cuda_measure"):
        raise RuntimeError("the compiled library has no CUDA kernels")
    return cuda.measure(name, torch.cuda.current_device())


@measures("grid_barrier", "a flag a block, read by all blocks")
def grid_barrier(sizes: Sizes) -> float:
    return by_library("flag_barrier")


@measures("cluster_barrier", "cluster.sync of 8 blocks")
def cluster_barrier(sizes: Sizes) -> float:
    return by_library("cluster_barrier")


@measures("mma_share", "mma.sync in bfloat16 on all multiprocessors, of the vendor's rate at the table's clock")
def mma_share(sizes: Sizes) -> float:
    rate, device = by_library("tensor_core"), device_at(sizes.device)
    return rate / (device.processors * device.tensor_flops_per_clock * device.clock)


@measures("shared_bytes_per_clock", "reads of 16 bytes a thread on one multiprocessor, at the table's clock")
def shared_bytes_per_clock(sizes: Sizes) -> float:
    rate, device = by_library("shared_reads"), device_at(sizes.device)
    return rate / device.clock


def of_driver(device: torch.device) -> dict[str, float]:
    """What the driver knows of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "processors": properties.multi_processor_count,
        "shared_per_block": properties.shared_memory_per_block_optin,
        "registers_per_processor": 4 * properties.regs_per_multiprocessor,
        "l2_bytes": 0.8 * properties.L2_cache_size,
    }


CLUSTER = 16  # multiprocessors: the largest cluster there is
CLUSTER_WIDTHS = (512, 768, 1024, 1280)  # that one multiprocessor does not hold, and a cluster does
CLUSTER_PAYS = 0.8  # share of the grid's time below which a kernel of its own is worth having


def cluster_verdict(name: str, numbers: dict[str, dict]) -> str:
    """Whether a kernel that keeps W in a cluster of 16 multiprocessors would pay, by the numbers of one device.

    An iteration there reads its share of W from shared memory, waits for two barriers of the cluster, one for the
    states and one for the norms, and for what depends on each other as in one multiprocessor; that of the grid is
    :func:`deq.gpu_times.grid_time`. One sample, which favours the cluster: a device keeps eight at work at most.
    """
    if numbers["cluster_barrier"]["value"] is None:
        return f"Regime B (W in a cluster): the {name} has no clusters."
    device = Device(name, (9, 0), **{key: number["value"] for key, number in numbers.items()})
    times = []
    for m in CLUSTER_WIDTHS:
        tiles = grid_tiles(m, 1, device, 2)
        if tiles is None:
            continue
        grid = grid_time(m, 1, device, PRECISIONS["bfloat16"], tiles)
        read = 2 * m * m / CLUSTER / device.shared_bandwidth
        cluster = read + 2 * device.cluster_barrier + device.block_reduction + LATENCY["resident cuda"]
        times.append((m, cluster, grid))
    each = ", ".join(f"{1e6 * cluster:.2f} us against {1e6 * grid:.2f} us at m = {m}" for m, cluster, grid in times)
    estimated = [key for key in ("cluster_barrier", "grid_barrier") if numbers[key]["basis"] != "measured"]
    pays = [m for m, cluster, grid in times if cluster < CLUSTER_PAYS * grid]
    what = f"it would pay at m = {', '.join(map(str, pays))}" if pays else "it would not pay"
    if estimated:
        what = f"not decided, {' and '.join(estimated)} being estimated; by those {what}"
    return f"Regime B (W in a cluster of {CLUSTER}), an iteration against the grid's: {each}: {what}."


class Measuring:
    """Iterate over ``steps()``: ``numbers`` is then the device's entry of deq/gpu_constants.json, as far as it could be
    measured, and ``failed`` says of every measurement that failed why.

    capability: that of the device; the CPU, where only the code can be tried, has none of its own.
    """

    def __init__(self, sizes: Sizes | None = None, capability: tuple[int, int] | None = None):
        self.sizes = sizes or Sizes(torch.device("cuda"))
        full = device_name(self.sizes.device.type)
        self.capability = capability or torch.cuda.get_device_capability(self.sizes.device)
        known, stand_in = key_of(full), find_device(full, self.capability).stands_for
        if not stand_in and self._is_another(known):  # H100 PCIe, a slice by MIG: of its name, not of its size
            stand_in = known
        self.name = " ".join(full.replace("NVIDIA", "").replace("-", " ").split()) if stand_in else known
        self.numbers = dict(table()[stand_in or known]["numbers"])
        if stand_in:
            for key, number in self.numbers.items():
                self.numbers[key] = number | {"basis": "estimated", "source": f"that of the {stand_in}"}
        self.failed: dict[str, str] = {}

    def _is_another(self, known: str) -> bool:
        """Whether this GPU has other numbers of multiprocessors than the entry of the table that its name speaks of."""
        if self.sizes.device.type != "cuda":
            return False
        return of_driver(self.sizes.device)["processors"] != table()[known]["numbers"]["processors"]["value"]

    def __len__(self) -> int:
        return len(MEASUREMENTS)

    def steps(self) -> Iterator[str]:
        """Before every measurement, its name. One that fails leaves its number as it was."""
        if self.sizes.device.type == "cuda":
            for name, value in of_driver(self.sizes.device).items():
                self._keep(name, value, "the driver")
        for name, (function, how) in MEASUREMENTS.items():
            yield name
            try:
                self._keep(name, function(self.sizes), how)
            except (RuntimeError, ValueError) as error:  # of torch too, for a dtype that it does not multiply
                self.failed[name] = str(error).splitlines()[0]

    def _keep(self, name: str, value: float, how: str) -> None:
        self.numbers[name] = self.numbers[name] | {"value": value, "basis": "measured", "source": how}

    def write(self, out: Path, update: bool) -> Path:
        """Write one row a number to ``out/<device>/constants.json`` and return the path; with ``update`` the entry also
        goes into deq/gpu_constants.json."""
        where = environment(self.sizes.device.type)
        rows = [{"constant": name, **number, **where} for name, number in self.numbers.items()]
        path = write(rows, out, "constants", self.sizes.device.type)
        if update:
            write_table(table() | {self.name: {"capability": self.capability, "numbers": self.numbers}})
        return path
