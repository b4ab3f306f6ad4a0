"""What is known of GPUs: one table of constants a device, each number with where it comes from (gpu_constants.json).

"measured" numbers were measured on that device (``deq bench constants`` does it), "estimated" ones come from data
sheets, publications or counting.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from .files import replace_text
from .kernels.tiles import FLOAT8_FROM, OLDEST

PATH = Path(__file__).with_name("gpu_constants.json")
BASES = ("measured", "estimated")
KIB = 1024
# A block's shared memory where it is less than that of the device whose constants stand in.
SHARED_PER_BLOCK = {(8, 6): 99 * KIB, (8, 7): 163 * KIB, (8, 9): 99 * KIB, (12, 0): 99 * KIB, (12, 1): 99 * KIB}


@dataclass(frozen=True)
class Device:
    """Constants of one GPU; rates in bytes or FLOP per second, times in seconds, None for what it does not have.

    stands_for: "" or the device whose constants are used, of the same or the nearest architecture, for want of its own.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    clock: float
    shared_per_block: int
    registers_per_processor: int
    shared_bytes_per_clock: int
    l2_bytes: float
    copy: float
    l2: float
    matmul_float8: float | None
    matmul_bfloat16: float
    matmul_tf32: float
    matmul_float32: float
    matmul_float64: float
    tensor_flops_per_clock: int
    mma_share: float
    grid_barrier: float
    cluster_barrier: float | None
    block_reduction: float
    graph_kernel: float
    graph_launch: float
    eager_op: float
    item: float
    stands_for: str = ""

    @property
    def shared_bandwidth(self) -> float:
        """Of one multiprocessor."""
        return self.shared_bytes_per_clock * self.clock


@lru_cache(maxsize=1)
def table() -> dict[str, dict]:
    """The whole file: by device its capability and numbers, each with value, unit, basis and source."""
    return json.loads(PATH.read_text())


def write_table(entries: dict[str, dict], path: Path | None = None) -> None:
    """Write such a table, one number a line; to the file that plans read if no path is given."""
    parts = []
    for name, entry in entries.items():
        rows = ",\n".join(f"      {json.dumps(key)}: {_row(number)}" for key, number in entry["numbers"].items())
        capability = json.dumps(list(entry["capability"]))
        parts.append(
            f'  {json.dumps(name)}: {{\n    "capability": {capability},\n    "numbers": {{\n{rows}\n    }}\n  }}'
        )
    replace_text(path or PATH, "{\n" + ",\n".join(parts) + "\n}\n")  # every solve on a GPU reads it


def _row(number: dict) -> str:
    value = number["value"]
    text = "null" if value is None else f"{value:.6g}"
    rest = json.dumps({key: number[key] for key in ("unit", "basis", "source")})
    return f'{{"value": {text}, {rest[1:]}'


def key_of(name: str) -> str | None:
    """The entry of the table that a GPU's name speaks of: the one of most words, all of which are in the name."""
    words = set(name.lower().replace("-", " ").split())
    keys = [key for key in table() if set(key.lower().split()) <= words]
    return max(keys, key=lambda key: len(key.split()), default=None)


@lru_cache(maxsize=16)
def find_device(name: str, capability: tuple[int, int] | None = None) -> Device:
    """The constants of a GPU.

    name: as the driver tells it, such as "NVIDIA H200", or that of a table entry. capability: its compute capability;
    None takes the table's, for a device that is in it. A GPU without an entry gets those of the nearest architecture,
    with its own limit of shared memory.
    Raises ValueError for a capability before 8.0, or an unknown name without a capability.
    """
    entries = table()
    known = key_of(name)
    if known is not None:
        own = tuple(entries[known]["capability"])
        if capability is None or capability == own:
            return _device(name, known)
    if capability is None:
        raise ValueError(
            f"name must be that of a known GPU ({', '.join(entries)}) or come with a capability; got {name!r}"
        )
    if capability < OLDEST:
        raise ValueError(
            f"capability must be at least {OLDEST[0]}.{OLDEST[1]}; {name} has {capability[0]}.{capability[1]}"
        )
    stand_in = min(entries, key=lambda key: (_distance(entries[key]["capability"], capability), _speed(entries[key])))
    device = _device(name, stand_in)
    if capability >= FLOAT8_FROM and device.matmul_float8 is None:  # Ada has what Ampere lacks
        device = replace(device, matmul_float8=2 * device.matmul_bfloat16)
    shared = SHARED_PER_BLOCK.get(capability, device.shared_per_block)
    return replace(device, capability=capability, shared_per_block=shared, stands_for=stand_in)


def device_at(place: torch.device | int) -> Device:
    """The constants of the GPU there, with as many multiprocessors as it has: cards of one name or architecture differ
    in them, and MIG leaves a part. Raises ValueError as find_device does."""
    device = find_device(torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place))
    return replace(device, processors=torch.cuda.get_device_properties(place).multi_processor_count)


def why_too_old(device: str) -> str:
    """Why the kernels cannot run on a GPU, "" if they can: "cuda:1", or "cuda" for the best of those that torch sees;
    one GPU may be older than another."""
    index, count = torch.device(device).index, torch.cuda.device_count()
    if index is not None and index >= count:  # of a FakeTensorMode
        return "torch sees no such device"
    capability = max(map(torch.cuda.get_device_capability, range(count) if index is None else (index,)))
    if capability < OLDEST:
        return f"its kernels need compute capability {OLDEST[0]}.{OLDEST[1]}; it has {capability[0]}.{capability[1]}"
    return ""


def _device(name: str, key: str) -> Device:
    entry = table()[key]
    return Device(name, tuple(entry["capability"]), **{k: number["value"] for k, number in entry["numbers"].items()})


def _distance(mine: list[int], capability: tuple[int, int]) -> float:
    return abs(mine[0] - capability[0]) + abs(mine[1] - capability[1]) / 10


def _speed(entry: dict) -> float:
    """The slower of two devices of one architecture stands in for a third."""
    return entry["numbers"]["copy"]["value"] or math.inf
