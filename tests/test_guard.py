"""The guard: its counts repeat, rising ones are found, and the golden numbers are those of this code."""

import copy
import json
import shutil

import pytest
from click.testing import CliRunner

from deq import _library
from deq.bench import guard, instructions
from deq.bench.cases import COUNT_CASES, INSTRUCTION_CASES
from deq.cli import main

pytestmark = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
needs_valgrind = pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind counts the instructions")


@pytest.fixture(scope="module")
def golden():
    return guard.read()


@pytest.fixture(scope="module")
def counted():
    return guard.count_steps()


def measured(golden, **parts):
    return golden | parts


def test_steps_do_what_they_did(golden, counted):
    findings = guard.compare(golden, measured(golden, counts=counted))
    assert not [str(f) for f in findings if f.fails]


def test_counts_repeat(counted):
    assert guard.count_steps() == counted
    assert len(counted) >= len(COUNT_CASES)


@needs_valgrind
def test_instructions_are_what_they_were_and_a_slow_kernel_is_found(golden):
    """The portable kernels stand for a slowed one: the same answers, three times the instructions of avx2's."""
    avx2 = guard.count_instructions("avx2")
    now = measured(golden, instructions={"avx2": avx2}, compiler=_library.build["compiler"])
    assert not [str(f) for f in guard.compare(golden, now) if f.fails]
    (slow,) = instructions.count(_library.path, "portable", [INSTRUCTION_CASES["relu"]])
    found = guard.compare(golden, measured(golden, instructions={"avx2": {"relu": slow}}))
    assert {f.quantity for f in found if f.fails} == {"first", "again"}


def test_what_rises_fails_and_what_falls_is_told(golden):
    assert guard.compare(golden, golden) == []
    changed = copy.deepcopy(golden)
    changed["counts"]["plain, native"]["forward: operators"] += 1
    changed["counts"]["plain, native"]["evaluations"] -= 1
    changed["counts"]["gelu, native"]["backward: products in float32"] = 10**6
    changed["instructions"]["avx2"]["tanh"]["again"] = int(1.03 * golden["instructions"]["avx2"]["tanh"]["again"])
    fails = [f for f in guard.compare(golden, changed) if f.fails]
    assert [(f.case, f.quantity) for f in fails] == [
        ("avx2, tanh", "again"),
        ("gelu, native", "backward: products in float32"),
        ("plain, native", "forward: operators"),
    ]
    assert "(+3.0%)" in str(fails[0])
    changed["compiler"] = "another"
    assert "again" not in [f.quantity for f in guard.compare(golden, changed) if f.fails]


def test_a_new_quantity_fails(golden):
    changed = copy.deepcopy(golden)
    changed["counts"]["plain, native"]["forward: host reads"] = 1
    (finding,) = guard.compare(golden, changed)
    assert finding.fails and "+1" in str(finding)


def test_command(golden, monkeypatch, tmp_path):
    monkeypatch.setattr(guard, "GOLDEN", tmp_path / "guard.json")
    monkeypatch.setattr(guard.read, "__defaults__", (guard.GOLDEN,))
    monkeypatch.setattr(guard.write, "__defaults__", (guard.GOLDEN,))
    monkeypatch.setattr(guard, "measure", lambda: pytest.fail("counted, with nothing to compare"))
    run = lambda *options: CliRunner().invoke(main, ["bench", "guard", *options])  # noqa: E731
    missing = run()
    assert missing.exit_code == 1 and "run this in a checkout" in missing.output
    guard.GOLDEN.write_text("<<<<<<< HEAD\n")
    unmerged = run()
    assert unmerged.exit_code == 1 and f"{guard.GOLDEN} is no JSON: " in unmerged.output
    monkeypatch.setattr(guard, "measure", lambda: golden)
    assert run("--update").exit_code == 0 and json.loads(guard.GOLDEN.read_text()) == golden
    assert run().exit_code == 0
    more = copy.deepcopy(golden)
    more["counts"]["plain, native"]["packed bytes"] *= 2
    monkeypatch.setattr(guard, "measure", lambda: more)
    result = run()
    assert result.exit_code == 1 and "plain, native: packed bytes was" in result.output and "(+100.0%)" in result.output


def test_golden_numbers_that_cannot_be_written_are_said_before_anything_is_counted(golden, monkeypatch, tmp_path):
    monkeypatch.setattr(guard, "measure", lambda: pytest.fail("counted"))
    (tmp_path / "file").write_text("")
    for folder, words in (("file", "cannot write"), ("none", "run this in a checkout")):
        monkeypatch.setattr(guard, "GOLDEN", tmp_path / folder / "guard.json")
        result = CliRunner().invoke(main, ["bench", "guard", "--update"])
        assert result.exit_code == 1 and words in result.output, result.exception
    kept = tmp_path / "guard.json"
    kept.write_text("as it was")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guard, "GOLDEN", kept)
    monkeypatch.setattr(guard.write, "__defaults__", (kept,))
    monkeypatch.setattr(guard, "measure", lambda: golden)
    monkeypatch.setattr("pathlib.Path.replace", full)
    result = CliRunner().invoke(main, ["bench", "guard", "--update"])
    assert result.exit_code == 1 and "No space left on device" in result.output and kept.read_text() == "as it was"


def test_without_valgrind(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="valgrind, which is not installed"):
        guard.count_instructions("avx2")
