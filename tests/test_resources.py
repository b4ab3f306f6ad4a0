"""Ahead-of-time compilation of the Triton kernels: no spill, no tensor-core instruction lost, no budget exceeded."""

import dataclasses

import pytest

from deq.bench import resources
from deq.kernels import cell

GOLDEN = resources.read_golden()
RECORDS = {(record["kernel"], record["architecture"]): record for record in GOLDEN["resources"]}


def test_the_file_lists_every_variant_once():
    assert len(RECORDS) == len(GOLDEN["resources"])
    assert set(RECORDS) == {(variant.kernel, variant.architecture) for variant in resources.variants()}
    for record in GOLDEN["resources"]:
        assert set(record) == {"kernel", "architecture", "registers", "stack", "shared", "instruction"}


def test_the_file_keeps_the_budgets():
    assert resources.faults(GOLDEN["resources"], GOLDEN) == []
    for record in GOLDEN["resources"]:
        assert record["shared"] <= 99 * 1024, "kernels/cell.py says that every GPU since Ampere can run it"


def test_wide_tiles_use_wgmma():
    seen = 0
    for variant in resources.variants(["sm_90"]):
        if variant.tiles.samples >= 64 and (variant.dtype in ("bfloat16", "float16") or variant.precision != "ieee"):
            assert RECORDS[variant.kernel, "sm_90"]["instruction"].startswith("wgmma"), variant.kernel
            seen += 1
    assert seen > 0


def every_tile_once():
    """For sm_80 and sm_90 each, all tiles, with another kind of variant from tile to tile."""
    groups: dict[tuple, list[resources.Variant]] = {}
    for variant in resources.variants(["sm_80", "sm_90"]):
        if variant.dtype != "float16":  # compiles like bfloat16
            groups.setdefault((variant.architecture, variant.dtype, variant.precision, variant.tiles), []).append(
                variant
            )
    return [group[place % len(group)] for place, group in enumerate(groups.values())]


def test_compiles_to_what_the_file_says():
    chosen = every_tile_once()
    records = list(resources.measure(chosen))
    assert [record["kernel"] for record in records] == [variant.kernel for variant in chosen]
    assert resources.faults(records, GOLDEN) == []


def test_a_variant_that_does_not_compile_is_named_and_the_rest_goes_on():
    good = resources.Variant("float32", "ieee", cell.Tiles(16, 32, 64, 4, 4), *resources.KINDS[0], "sm_80")
    bad = dataclasses.replace(good, tiles=cell.Tiles(16, 24, 64, 4, 4))
    failed, *rest = resources.measure([bad, good])
    assert failed["kernel"] == bad.kernel and "power of 2" in failed["error"]
    (sentence,) = resources.faults([failed], GOLDEN)
    assert sentence.startswith(f"{bad.kernel}, sm_80: does not compile")
    assert resources.faults(rest, GOLDEN) == [] and len(rest) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack": 8}, "stack 8, allowed 0"),
        ({"shared": 228 * 1024}, "shared 233472, allowed 232448"),
        ({"instruction": "mma.sync.aligned.m16n8k16"}, "multiplies by mma, was wgmma"),
        ({"kernel": "another"}, "not in resources.json"),
    ],
)
def test_faults_are_named(change, sentence):
    record = next(r for r in GOLDEN["resources"] if r["instruction"].startswith("wgmma"))
    (fault,) = resources.faults([record | change], GOLDEN)
    assert fault.endswith(sentence)


def test_more_registers_are_a_fault_for_the_same_compiler_only(monkeypatch):
    record = next(r for r in GOLDEN["resources"] if r["registers"] < 255)
    more = record | {"registers": record["registers"] + 1}
    monkeypatch.setattr(resources.triton, "__version__", GOLDEN["triton"])
    (fault,) = resources.faults([more], GOLDEN)
    assert fault.endswith(f"registers {more['registers']}, was {record['registers']}")
    monkeypatch.setattr(resources.triton, "__version__", "0.0")
    assert resources.faults([more], GOLDEN) == []
