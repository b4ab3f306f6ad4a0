"""What this machine can do at most, measured on the spot: arithmetic by precision, reading by where the data lie."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from threading import Barrier
from time import perf_counter

import torch

from .. import _library

SECONDS = 0.2  # of every measurement
WORKING_SETS = {"cache": 512 << 10, "large cache": 8 << 20, "memory": 256 << 20}  # bytes a thread
PRODUCT = 512  # width of the square products whose rate stands for a precision without a peak of its own
GPU_PRODUCT, GPU_BYTES = 8192, 1 << 30


@dataclass(frozen=True)
class Ceilings:
    """flops: FLOP/s by precision, of all threads together; how: how each was found. bandwidth: byte/s by name, reading
    working sets of ``sizes`` bytes a thread, all threads at once (GPU: a copy, its bytes read and written)."""

    device: str
    threads: int
    flops: dict[str, float]
    how: dict[str, str]
    bandwidth: dict[str, float]
    sizes: dict[str, int]

    def as_dict(self) -> dict:
        return asdict(self)

    def bandwidth_for(self, size: int) -> tuple[str, float]:
        """Name and byte/s of the fastest level that holds ``size`` bytes a thread; the slowest where none does."""
        fitting = [name for name, bytes in self.sizes.items() if size <= bytes]
        name = fitting[0] if fitting else list(self.sizes)[-1]
        return name, self.bandwidth[name]


def ceilings(device: str = "cpu") -> Ceilings:
    """Measured once a process for a device and a number of threads (``torch.get_num_threads()``); a second or two."""
    return _gpu(device) if torch.device(device).type == "cuda" else _cpu(torch.get_num_threads(), _isa())


def _isa() -> str:
    return _library.compiled.deq_cpu_isa().decode() if _library.compiled else ""


@lru_cache(maxsize=16)
def _cpu(threads: int, isa: str) -> Ceilings:
    flops, how, bandwidth = {}, {}, {}
    library = _library.compiled
    product = f"best product {PRODUCT} x {PRODUCT} of torch on one thread, times the threads"
    torch.set_num_threads(1)  # a thread's best is what no other process took; all threads at once rarely have that
    try:
        for name in ("bfloat16", "float16", "float32", "float64"):
            flops[name], how[name] = threads * _product(getattr(torch, name)), product
        flops["int8"], how["int8"] = threads * _int8_product(), product
    finally:
        torch.set_num_threads(threads)
    if library:
        for kind, name in enumerate(("float32", "float64")):
            flops[name] = 1e9 * _together(threads, partial(library.deq_cpu_peak_gflops, kind, SECONDS))
            how[name] = f"{isa} multiply-adds on registers, all threads"
    for name, size in WORKING_SETS.items():
        if library:
            bandwidth[name] = 1e9 * _together(threads, partial(library.deq_cpu_read_gbs, size, SECONDS))
        else:
            bandwidth[name] = _rate(
                torch.ones(threads * size // 4, dtype=torch.float32, device="cpu").sum, threads * size
            )
    return Ceilings("cpu", threads, flops, how, bandwidth, dict(WORKING_SETS))


def _together(threads: int, measure) -> float:
    """The sum of what all threads reach at the same time."""
    barrier = Barrier(threads)

    def one(_: int) -> float:
        barrier.wait()
        return measure()

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one, range(threads)))


def _rate(run, amount: float, wait=lambda: None) -> float:
    """``amount`` a call, at the best of the calls made in ``SECONDS``."""
    best, end, calls = float("inf"), perf_counter() + SECONDS, 0
    while calls < 3 or perf_counter() < end:
        wait()
        start = perf_counter()
        run()
        wait()
        best = min(best, perf_counter() - start)
        calls += 1
    return amount / best


def _product(dtype: torch.dtype, device: str = "cpu", size: int = PRODUCT, wait=lambda: None) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return _rate(partial(torch.mm, a, a, out=out), 2.0 * size**3, wait)


def _int8_product(device: str = "cpu", size: int = PRODUCT, wait=lambda: None) -> float:
    a = torch.ones(size, size, dtype=torch.int8, device=device)
    return _rate(partial(torch._int_mm, a, a), 2.0 * size**3, wait)


@lru_cache(maxsize=16)
def _gpu(device: str) -> Ceilings:
    wait = partial(torch.cuda.synchronize, device)
    names = ("float32", "float64", "bfloat16", "float16")
    flops = {name: _product(getattr(torch, name), device, GPU_PRODUCT, wait) for name in names}
    flops["int8"] = _int8_product(device, GPU_PRODUCT, wait)
    a = torch.ones(GPU_BYTES // 4, dtype=torch.float32, device=device)
    bandwidth = {"memory": _rate(partial(torch.empty_like(a).copy_, a), 2.0 * GPU_BYTES, wait)}
    how = dict.fromkeys(flops, f"best product {GPU_PRODUCT} x {GPU_PRODUCT} of torch")
    return Ceilings(torch.cuda.get_device_name(device), 1, flops, how, bandwidth, {"memory": GPU_BYTES})
