"""Ahead-of-time compilation of the GPU kernels: no spill, no tensor-core instruction lost, no budget exceeded."""

import dataclasses
import re
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from deq import _library
from deq.bench import compile as ahead_of_time
from deq.bench import resources
from deq.gpu_device import find_device, table
from deq.gpu_plan import choose
from deq.gpu_times import PRECISIONS, resident_shared
from deq.kernels.tiles import STEP_TILES

GOLDEN = resources.read_golden()
RECORDS = {(record["kernel"], record["architecture"]): record for record in GOLDEN["resources"]}
TRITON = [record for record in GOLDEN["resources"] if not record["kernel"].startswith("cuda")]
VARIANTS = {variant.name: variant for variant in resources.compilations()}


def test_the_file_lists_one_of_each_group_and_some_for_other_architectures(monkeypatch):
    monkeypatch.setattr(resources, "architectures", lambda: tuple(resources.BUDGETS))  # whatever this Triton can
    assert len(RECORDS) == len(GOLDEN["resources"])
    listed = {(record["kernel"], record["architecture"]) for record in TRITON}
    assert listed == {(variant.name, architecture) for variant, architecture in resources.guarded()}
    groups = {variant.group for variant in VARIANTS.values() if variant.chosen}
    assert {VARIANTS[name].group for name, architecture in listed if architecture == "sm_90"} == groups
    assert {architecture for _, architecture in listed} == set(resources.BUDGETS)
    assert len(listed) < 90, "a test has no time for more"
    for record in GOLDEN["resources"]:
        assert set(record) == {"kernel", "architecture", *resources.KEYS}


def test_names_tell_variants_apart():
    variants = resources.compilations()
    assert len(VARIANTS) == len(variants)
    for variant in variants:
        assert variant.group.split(",")[0] == variant.name.split(",")[0]
        assert not set(variant.types) & set(variant.constants)
        assert set(variant.aligned) <= set(variant.types)


def test_the_file_keeps_the_budgets():
    assert resources.faults(GOLDEN["resources"], GOLDEN) == []
    for record in TRITON:
        if record["kernel"].startswith("cell,"):
            assert record["shared"] <= 99 * 1024, "kernels/tiles.py says that every GPU since Ampere can run it"


def test_float8_is_compiled_where_there_is_such_a_unit():
    eight = [record for record in TRITON if ", float8, " in record["kernel"]]
    assert {record["architecture"] for record in eight} == {"sm_90", "sm_100"}
    assert all(VARIANTS[record["kernel"]].runs_on(record["architecture"]) for record in TRITON)
    wide = [r for r in eight if r["kernel"].startswith("delta step") and "x64x128" in r["kernel"]]
    assert {r["instruction"].split(".")[-1] for r in wide if r["instruction"].startswith("wgmma")} == {"e4m3"}


def test_wide_tiles_use_wgmma():
    wide = [
        record
        for record in TRITON
        if record["architecture"] == "sm_90"
        and VARIANTS[record["kernel"]].constants.get("BLOCK_B", 0) >= 64
        and VARIANTS[record["kernel"]].constants.get("PRECISION") != "ieee"
    ]
    assert len({record["kernel"].split(",")[0] for record in wide}) >= 2
    for record in wide:
        assert record["instruction"].startswith("wgmma"), record["kernel"]


def groups_of(plan):
    """Names of the groups of kernels/ that a plan runs, without and with acceleration."""
    if plan.regime == "resident":
        return {f"resident solve, {kind}{plan.increments}, {plan.tiles.units}x{plan.tiles.samples}" for kind in KINDS}
    if plan.increments == "native":
        if plan.split_k > 1:  # compiled with the dearest ending alone
            return {f"step, accelerated, {plan.split_k} splits, {plan.tiles}"}
        return {f"step, {kind}1 split, {plan.tiles}" for kind in KINDS}
    anchor = next(tiles for tiles in STEP_TILES if tiles.samples == plan.tiles.samples)
    return {
        f"delta step, {plan.increments}, {plan.tiles}",
        f"anchor, {plan.increments}, accelerated, 1 split, {anchor}",
    }


KINDS = ("", "accelerated, ")


@pytest.mark.parametrize("increments", [("native",), ("native", "bfloat16"), ("native", "bfloat16", "float8")], ids=str)
def test_what_a_plan_chooses_was_compiled_and_fits(increments):
    """Over widths, batches and devices: groups of the file, within the device's shared memory."""
    shared: dict[str, int] = {}
    for record in TRITON:  # nearly the same for every architecture
        group = re.sub(
            r"\d+ splits", "splits", VARIANTS[record["kernel"]].group
        )  # 2, 4 or 8, of which the file has one
        shared[group] = max(record["shared"], shared.get(group, 0))
    seen = set()
    for device in map(find_device, table()):
        for m in (1, 17, 64, 100, 200, 256, 333, 1024, 4096, 8192):
            for B in (0, 1, 5, 32, 64, 256, 4096):
                plan = choose(m, B, dtype="float32", device=device, increments=increments)
                groups = {re.sub(r"\d+ splits", "splits", group) for group in groups_of(plan)}
                seen |= groups
                assert all(shared[group] <= device.shared_per_block for group in groups), (plan, groups)
                if plan.regime == "resident":
                    size = PRECISIONS[plan.precision if plan.increments == "native" else plan.increments].size
                    assert all(shared[group] <= resident_shared(plan.tiles.units, size) for group in groups)
    streamed = {"step"} if increments == ("native",) else {"delta step", "anchor"}
    assert {group.split(",")[0] for group in seen} >= {"resident solve"} | streamed


def test_compiles_to_what_the_file_says():
    jobs = resources.guarded()
    records = list(ahead_of_time.compile_all(jobs))
    assert len(records) == len(jobs)
    assert {(r["kernel"], r["architecture"]) for r in records} == {(variant.name, name) for variant, name in jobs}
    assert {record["architecture"] for record in records} == set(resources.architectures())
    assert resources.faults(records, GOLDEN) == []


def test_a_variant_that_does_not_compile_is_named_and_the_rest_goes_on(monkeypatch):
    good = next(variant for variant, name in resources.guarded(["cell"]) if name == "sm_80")
    bad = dataclasses.replace(good, constants=good.constants | {"BLOCK_N": 24})
    monkeypatch.setattr(ahead_of_time.os, "cpu_count", lambda: 1)  # one process for both
    failed, *rest = ahead_of_time.compile_all([(bad, "sm_80"), (good, "sm_80")])
    assert failed["kernel"] == bad.name and "power of 2" in failed["error"]
    (sentence,) = resources.faults([failed], GOLDEN)
    assert sentence.startswith(f"{bad.name}, sm_80: does not compile")
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
    record = next(r for r in GOLDEN["resources"] if r["instruction"].startswith("wgmma") and r["stack"] == 0)
    (fault,) = resources.faults([record | change], GOLDEN)
    assert fault.endswith(sentence)


def test_more_registers_are_a_fault_for_the_same_compiler_only(monkeypatch):
    record = next(r for r in TRITON if r["registers"] < 255)
    more = record | {"registers": record["registers"] + 1}
    monkeypatch.setattr(resources.triton, "__version__", GOLDEN["triton"])
    (fault,) = resources.faults([more], GOLDEN)
    assert fault.endswith(f"registers {more['registers']}, was {record['registers']}")
    monkeypatch.setattr(resources.triton, "__version__", "0.0.0")
    assert resources.faults([more], GOLDEN) == []


def test_blackwell_from_the_triton_that_can(monkeypatch):
    for version, expected in (("3.6.0", ("sm_80", "sm_90")), ("3.7.1", ("sm_80", "sm_90", "sm_100"))):
        monkeypatch.setattr(resources.triton, "__version__", version)
        assert resources.architectures() == expected


def test_the_file_is_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(resources.triton, "__version__", GOLDEN["triton"])
    monkeypatch.setattr(resources, "nvcc_version", lambda: GOLDEN["nvcc"])
    committed = resources.GOLDEN.read_text()
    monkeypatch.setattr(resources, "GOLDEN", tmp_path / "resources.json")
    resources.write_golden(GOLDEN["resources"])
    assert resources.GOLDEN.read_text() == committed
    mine = {
        "kernel": "cuda, f",
        "architecture": "sm_90a",
        "registers": 1,
        "stack": 0,
        "shared": 0,
        "instruction": "fma",
    }
    monkeypatch.setattr(resources.triton, "__version__", "0.0")
    monkeypatch.setattr(resources, "nvcc_version", lambda: "13.0")
    resources.write_golden([mine], GOLDEN)  # those of other kernels stay, and who compiled them
    assert resources.read_golden()["nvcc"] == "13.0" and resources.read_golden()["triton"] == GOLDEN["triton"]
    written = resources.read_golden()["resources"]
    assert [r for r in written if r != mine] == TRITON and mine in written


CUDA = """
#include <mma.h>
using namespace nvcuda;
template <int n> __global__ void product(const half* a, const half* b, float* c) {
  __shared__ float out[n];
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> x;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> y;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> z;
  wmma::fill_fragment(z, 0.0f);
  wmma::load_matrix_sync(x, a, 16);
  wmma::load_matrix_sync(y, b, 16);
  wmma::mma_sync(z, x, y, z);
  wmma::store_matrix_sync(out, z, 16, wmma::mem_row_major);
  c[threadIdx.x] = out[threadIdx.x];
}
__global__ void scale(float* x) { x[threadIdx.x] *= 2; }
template __global__ void product<256>(const half*, const half*, float*);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to build a library with CUDA kernels")
def test_cuda_kernels_are_read_from_the_library(tmp_path):
    (tmp_path / "kernels.cu").write_text(CUDA)
    library = tmp_path / "libkernels.so"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    command = ["nvcc", "-shared", "-Xcompiler", "-fPIC", *targets, tmp_path / "kernels.cu", "-o", library]
    subprocess.run(command, check=True, capture_output=True)
    records = {(record["kernel"], record["architecture"]): record for record in resources.of_library(library)}
    assert set(records) == {(f"cuda, {k}", a) for k in ("product<256>", "scale") for a in ("sm_80", "sm_90a")}
    for architecture in ("sm_80", "sm_90a"):
        product, scale = (records[f"cuda, {name}", architecture] for name in ("product<256>", "scale"))
        assert product["instruction"].startswith("HMMA.16816") and scale["instruction"] == "fma"
        assert product["shared"] >= 4 * 256 and scale["shared"] == product["stack"] == 0
        assert 0 < scale["registers"] < product["registers"] < 64
    faults = resources.faults(records.values(), {"triton": "", "nvcc": None, "resources": list(records.values())})
    assert faults == []


def test_without_a_tool_that_reads_names(monkeypatch):
    monkeypatch.setattr(resources, "compile_all", lambda jobs: pytest.fail("compiled"))
    monkeypatch.setattr(_library, "build", {"cuda": ["90a-real"]})
    monkeypatch.setenv("PATH", "")
    ended = CliRunner().invoke(resources.main, ["--kernel", "cell", "--kernel", "cuda"])
    assert ended.exit_code == 1 and "install binutils, or leave them out with --kernel cell" in ended.output
    assert resources._demangled([]) == {}


@pytest.mark.skipif(
    _library.path is None or not _library.build.get("cuda"),
    reason=f"the library has no CUDA kernels: {_library.build.get('why_not_cuda', _library.reason)}",
)
def test_the_library_is_what_the_file_says():
    records = resources.of_library(_library.path)
    assert records and resources.faults(records, GOLDEN) == []
    assert all(re.fullmatch(r"sm_\d+[a-z]?", record["architecture"]) for record in records)
