"""What runs on a GPU is decided by formulas and constants alone: here against the table they were made for."""

import dataclasses
import json
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from deq import gpu_device
from deq.backends import cuda, triton_kind
from deq.gpu_device import find_device
from deq.gpu_plan import ACCURATE, INCREMENTS, WORTH_IT, choose, fastest
from deq.gpu_times import PRECISIONS, REGIMES, expected, resident_shared, tiles_of, time_of
from deq.kernels.tiles import (
    DELTA_TILES,
    ENOUGH_PROGRAMS,
    FLOAT8_FROM,
    MOST_SPLITS,
    STEP_TILES,
    TILES,
    programs,
    step_tiles,
)

H200 = find_device("NVIDIA H200", (9, 0))
DEVICES = [find_device(name) for name in gpu_device.table()]
# Whole solves of float32 Gaussian problems (norm 0.9, relu, 1e-5) on an NVIDIA H200, torch 2.11, Triton 3.6: m, B,
# regime, microseconds of the device, iterations of the slowest sample, and microseconds by the clock where two ways
# can be compared. Kernels of bench/results/nvidia-h200.
MEASURED = """
  64    1  resident         31  14   272
  64    1  cell            132  14   410
  64  256  resident         32  14   232
  64  256  resident cuda    47  16    82
  64  256  grid             76  16   129
  64  256  cell            147  14   437
  64 4096  resident         65  15   269
  64 4096  resident cuda   174  16   218
  64 4096  cell            267  15   614
 256    1  resident        122  13   341
 256    1  resident cuda    68  13   112
 256    1  grid             57  13   100
 256    1  cell            148  13   731
 256    8  resident cuda    70  14     -
 256    8  grid             61  14     -
 256  256  resident        201  13   609
 256  256  resident cuda   105  14   150
 256  256  grid            120  14   170
 256  256  cell            220  13   569
 256 1024  resident cuda   131  14   198
 256 1024  grid            179  14   248
 256 4096  resident        424  13     -
 256 4096  resident cuda   596  15   680
 256 4096  grid            758  15   825
 300   64  resident cuda    77  14   131
 300   64  grid            118  14   169
 512    1  grid             64  13   107
 512   32  grid             87  14   135
 512  128  grid            112  14   157
 512  512  grid            185  14   238
 512 1024  grid            367  14   428
 512 1024  cell            338  13   699
 768  256  grid            227  14   276
1024    1  grid             92  14   142
1024   32  grid            122  14   199
1024  128  grid            173  14   249
1024  256  grid            255  14   338
1024  256  cell            252  14   633
1024  512  grid            507  14   570
1024  512  cell            423  13   652
2048    1  grid            112  13   159
2048   32  grid            186  13   261
2048   64  grid            240  13   305
2048   64  cell            564  13   895
4096    1  grid            206  13   298
4096    8  grid            250  13   307
2048  256  cell            424  14     -
1024 4096  cell           1420  14     -
4096 4096  cell          12172  13     -
"""


def measured():
    for line in MEASURED.strip("\n").splitlines():
        m, B, *regime, device, iterations, clock = line.split()
        yield int(m), int(B), " ".join(regime), float(device) / int(iterations), None if clock == "-" else float(clock)


@pytest.mark.parametrize(("m", "B", "regime", "us"), [row[:4] for row in measured()])
def test_times_are_near_what_was_measured(m, B, regime, us):
    # One of all takes twice what the formulas say. It was measured once, and why is not known.
    least = 0.5 if (m, B, regime) == (2048, 64, "cell") else 0.6
    assert least < 1e6 * fastest(regime, m, B, H200).iteration / us < 1.35


def test_what_is_chosen_is_near_the_fastest_measured():
    for m, B in dict.fromkeys(row[:2] for row in measured()):
        by_clock = {row[2]: row[4] for row in measured() if row[:2] == (m, B) and row[4] is not None}
        if len(by_clock) > 1:
            chosen = min(by_clock, key=lambda regime: fastest(regime, m, B, H200).solve)
            assert by_clock[chosen] <= 1.1 * min(by_clock.values()), (m, B, chosen)


def test_capacity():
    """The largest widths that the regimes hold on an H200 with two bytes an element, and with one."""

    def largest(regime, precision, B=1):
        return max(m for m in range(1, 7000) if time_of(regime, m, B, H200, precision) is not None)

    assert [largest(r, "bfloat16") for r in ("resident", "resident cuda", "grid")] == [256, 336, 4224]
    assert largest("resident", "ieee") == 64
    # A group of 16 blocks has 32 samples, 132 multiprocessors have eight groups: the 257th waits.
    assert time_of("grid", 1024, 256, H200, "bfloat16") < 0.6 * time_of("grid", 1024, 257, H200, "bfloat16")
    a100 = find_device("A100")
    assert time_of("cell", 64, 1, a100, "float8") is None  # no such units
    assert time_of("resident cuda", 336, 1, a100, "bfloat16") is None


shapes = st.tuples(st.integers(1, 9000), st.integers(0, 5000))


@hypothesis.given(
    shapes, st.integers(0, 500), st.integers(0, 5000), st.sampled_from(DEVICES), st.sampled_from(list(PRECISIONS))
)
def test_times_grow_with_width_and_batch(shape, wider, more, device, precision):
    m, B = shape
    for regime in REGIMES:
        times = [time_of(regime, *s, device, precision) for s in (shape, (m + wider, B), (m, B + more))]
        if times[0] is None:
            assert times[1] is None and times[2] is None  # what does not fit fits no better when it grows
        else:
            assert times[0] > 0 and all(times[0] <= t for t in times[1:] if t is not None)


@hypothesis.given(
    shapes,
    st.sampled_from(DEVICES),
    st.sampled_from(list(ACCURATE)),
    st.sampled_from([("cell",), ("resident", "cell"), ("resident cuda", "cell"), ("resident", "grid", "cell")]),
    st.sampled_from([("native",), ("native", "bfloat16"), ("native", "bfloat16", "float8")]),
)
def test_choices_are_inside_capacity_and_no_slower_than_any_other(shape, device, dtype, allowed, increments):
    m, B = shape
    plan = choose(m, B, dtype=dtype, device=device, allowed=allowed, increments=increments)
    assert plan.regime in allowed and plan.increments in increments and plan.precision == ACCURATE[dtype]
    kept = plan.precision if plan.increments == "native" else plan.increments
    if plan.regime == "cell":
        ladders = (*TILES.values(), *DELTA_TILES.values())
        assert plan.tiles in {*STEP_TILES, *(tiles for ladder in ladders for tiles in ladder)}
        assert plan.tiles.samples <= max(16, 2 * B)
    else:
        assert plan.tiles.units * plan.tiles.depth * PRECISIONS[kept].size <= device.shared_per_block + 96 * 1024
    assert plan.tiles == tiles_of(plan.regime, m, B, device, kept)
    best = expected(plan.regime, m, B, device, plan.precision, plan.increments)
    assert plan.expected_us == 1e6 * best.iteration > 0
    kinds = ("native",) if dtype == "float64" else increments
    others = [expected(r, m, B, device, ACCURATE[dtype], i) for r in allowed for i in kinds]
    assert all(WORTH_IT * best.solve <= other.solve for other in others if other is not None)
    assert plan.why


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", ACCURATE)
def test_no_regime_comes_back(device, dtype):
    """From narrow to wide, and from few samples to many, a regime that was left is not chosen again. Widths are powers
    of two: regime "resident" pads to them, which can cost it the widths just above one. They are compared without
    increments, which come to the resident kernel at 65 and give it back what it had lost to the cell."""
    widths, batches = [2**k for k in range(14)], [1, 8, 32, 33, 256, 4096]
    options = {"dtype": dtype, "device": device, "allowed": ("resident", "grid", "cell")}

    def runs(choices):
        return [choice for i, choice in enumerate(choices) if i == 0 or choices[i - 1] != choice]

    for B in batches:
        seen = runs([choose(m, B, **options).regime for m in widths])
        assert len(set(seen)) == len(seen), (B, seen)
    for m in widths:
        for increments in (INCREMENTS[:1], INCREMENTS[:2]):
            seen = runs([choose(m, B, increments=increments, **options).regime for B in batches])
            assert len(set(seen)) == len(seen), (m, seen)


@hypothesis.given(shapes)
def test_the_inner_dimension_is_split_where_few_tiles_leave_a_device_idle(shape):
    m, B = shape
    tiles, splits = step_tiles(B, m)
    plan = choose(m, B, dtype="float32", device=H200, allowed=("cell",))
    assert (plan.tiles, plan.split_k) == (tiles, splits)
    assert 1 <= splits <= MOST_SPLITS
    if splits > 1:
        assert tiles.samples == STEP_TILES[-1].samples
        assert splits // 2 * programs(B, m, tiles) <= ENOUGH_PROGRAMS
        assert splits * tiles.depth <= m
    assert choose(m, B, dtype="float32", device=H200, allowed=("cell",), increments=("bfloat16",)).split_k == 1


def test_increments_are_chosen_where_they_pay():
    options = {"dtype": "float32", "device": H200, "increments": ("native", "bfloat16")}
    assert choose(64, 1, **options).increments == "native"  # W is on chip in float32
    narrow, wide = choose(256, 64, **options), choose(4096, 4096, **options)
    assert (narrow.regime, narrow.increments) == ("resident", "bfloat16")  # which only then holds W
    assert (wide.regime, wide.increments, wide.precision) == ("cell", "bfloat16", "tf32x3")
    assert "bfloat16 increments between anchors in tf32x3, about one in 6" in wide.why
    assert choose(4096, 4096, **options | {"dtype": "float64"}).increments == "native"


def test_float8_is_chosen_where_it_pays_and_the_device_has_it():
    options = {"dtype": "float32", "increments": ("native", "bfloat16", "float8")}
    chosen = {
        (m, B): choose(m, B, device=H200, **options).increments for m in (64, 256, 1024, 4096) for B in (1, 256, 4096)
    }
    assert chosen[64, 1] == "native" and chosen[256, 4096] == "bfloat16"  # on chip
    assert chosen[1024, 4096] == chosen[4096, 4096] == "float8"
    for device in DEVICES:
        found = {choose(m, B, device=device, **options).increments for m, B in chosen}
        assert ("float8" in found) == (device.capability >= FLOAT8_FROM), device.name
    forced = choose(100, 5, dtype="float32", device=H200, increments=("float8",))
    assert (forced.regime, forced.increments, forced.precision) == ("cell", "float8", "tf32x3")
    assert forced.tiles in DELTA_TILES["float8"]
    ada = find_device("NVIDIA L40S", (8, 9))  # the A100's constants, but with such units
    assert choose(100, 5, dtype="float32", device=ada, increments=("float8",)).increments == "float8"
    with pytest.raises(ValueError, match=r"increments of \('float8',\)"):
        choose(100, 5, dtype="float32", device=find_device("A100"), increments=("float8",))


def test_the_resident_kernel_has_these_shapes():
    """What the plan counts with is what kernels/solve_resident.py is compiled for."""
    from deq.kernels import solve_resident

    for m in (1, 16, 17, 64, 100, 128, 129, 256):
        size = 4 if m <= solve_resident.WHOLE.value else 2
        tiles = tiles_of("resident", m, 1, H200, "tf32x3" if size == 4 else "bfloat16")
        assert (tiles.samples, tiles.units) == (solve_resident.BLOCK_B, solve_resident.padded(m))
        assert tiles.warps == solve_resident.WARPS[tiles.units]
        assert resident_shared(tiles.units, size) <= H200.shared_per_block
    assert set(solve_resident.WARPS) == {tiles_of("resident", m, 1, H200, "bfloat16").units for m in range(1, 257)}
    assert tiles_of("resident", 257, 1, H200, "bfloat16") is None


def test_a_plan_says_what_it_is_and_why():
    plan = choose(2048, 8, dtype="float32", device=H200)
    assert str(plan) == "cell, tf32x3, tiles 16x32x64, inner dimension in 2 pieces"
    plan = choose(2048, 8, dtype="float32", device=H200, increments=("bfloat16",))
    assert str(plan) == "cell, tf32x3, tiles 16x64x128, bfloat16 increments"
    plan = choose(64, 8, dtype="float32", device=find_device("NVIDIA L40S", (8, 9)))
    assert "constants of the A100: those of NVIDIA L40S are not known (deq bench constants)" in plan.why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, "m must be at least 1 and B at least 0; got m = 0, B = 1"),
        ({"B": -1}, "m must be at least 1 and B at least 0; got m = 1, B = -1"),
        ({"dtype": "int8"}, "dtype must be of 'float64', .*; got 'int8'"),
        ({"allowed": ("warp",)}, "allowed must be of 'resident', .*; got 'warp'"),
        ({"increments": ("int4",)}, "increments must be of 'native', .*; got 'int4'"),
        ({"precision": "bf16"}, "precision must be of 'float8', .*; got 'bf16'"),
        ({"m": 5000, "allowed": ("grid",)}, "allowed must hold a regime that can run m = 5000, B = 1 on NVIDIA H200"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        choose(**{"m": 1, "B": 1, "dtype": "float32", "device": H200} | change)


class TestDevices:
    def test_every_number_says_where_it_comes_from(self):
        fields = {field.name for field in dataclasses.fields(gpu_device.Device)} - {"name", "capability", "stands_for"}
        for name, entry in gpu_device.table().items():
            assert set(entry["numbers"]) == fields, name
            for key, number in entry["numbers"].items():
                assert set(number) == {"value", "unit", "basis", "source"} and number["source"], (name, key)
                assert number["basis"] in gpu_device.BASES
                assert number["value"] is None or number["value"] > 0

    def test_only_what_was_measured_says_so(self):
        measured = {
            (name, key)
            for name, entry in gpu_device.table().items()
            for key, number in entry["numbers"].items()
            if number["basis"] == "measured"
        }
        counted = {"tensor_flops_per_clock"}
        assert measured == {("H200", key) for key in gpu_device.table()["H200"]["numbers"] if key not in counted}

    @pytest.mark.parametrize(
        ("name", "capability", "stand_in"),
        [
            ("NVIDIA H200", (9, 0), ""),
            ("NVIDIA A100-SXM4-80GB", (8, 0), ""),
            ("NVIDIA H100 80GB HBM3", (9, 0), ""),
            ("NVIDIA GH200 480GB", (9, 0), "H100"),
            ("NVIDIA RTX A6000", (8, 6), "A100"),
            ("NVIDIA B300", (10, 3), "B200"),
            ("NVIDIA GeForce RTX 5090", (12, 0), "B200"),
        ],
    )
    def test_find(self, name, capability, stand_in):
        device = find_device(name, capability)
        assert (device.name, device.capability, device.stands_for) == (name, capability, stand_in)
        consumer = capability in ((8, 6), (8, 9), (12, 0))
        assert device.shared_per_block == (99 * 1024 if consumer else {8: 163, 9: 227, 10: 227}[capability[0]] * 1024)

    @pytest.mark.parametrize(
        ("name", "capability", "processors", "m"),
        [("NVIDIA H100 PCIe", (9, 0), 114, 4000), ("NVIDIA GeForce RTX 4060", (8, 9), 24, 1024)],
    )
    def test_a_smaller_card_is_planned_as_it_is(self, monkeypatch, name, capability, processors, m):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability)
        own = SimpleNamespace(multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: own)
        assert expected("grid", m, 1, find_device(name, capability), "ieee", "bfloat16") is not None
        regime_of = cuda.regime_for.__wrapped__  # not the one that remembers
        assert regime_of(m, 1, 0) is None and regime_of(64, 1, 0) is not None
        plans = triton_kind.constants_of.__wrapped__(torch.device("cuda"))
        assert plans.processors == processors and plans.name == name

    def test_what_cannot_be_found(self):
        with pytest.raises(ValueError, match=r"capability must be at least 8\.0; Tesla T4 has 7\.5"):
            find_device("Tesla T4", (7, 5))
        with pytest.raises(
            ValueError, match=r"known GPU \(H200, H100, A100, B200\) or come with a capability; got 'MI300'"
        ):
            find_device("MI300")

    def test_the_file_is_as_it_is_written(self, tmp_path):
        path = tmp_path / "constants.json"
        gpu_device.write_table(gpu_device.table(), path)
        assert path.read_text() == gpu_device.PATH.read_text()
        assert json.loads(path.read_text()) == gpu_device.table()
