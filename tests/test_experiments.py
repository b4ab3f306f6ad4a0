"""What all experiments share: verdicts, records, settings, the ledger."""

import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from deq import _library
from deq.experiments import REGISTRY, SettingsError, execute, parts_path
from deq.experiments._report import _rich
from deq.experiments._result import (
    NOT_JUDGED,
    NOT_REPRODUCED,
    PROVED,
    REPRODUCED,
    VIOLATED,
    Claim,
    Result,
    Table,
    number,
    proved,
    proved_for_all,
    sign_test,
    spread,
    to_json,
)
from deq.experiments._run import LARGEST_SEED, LEVELS, KeptParts, Run, _code_digest


def test_proved_for_all_names_the_worst_case():
    rows = [{"case": f"case {v}", "v": v} for v in (0.1, 0.9, 0.5)]
    claim = proved_for_all("x", "Thm.", rows, lambda r: r["v"], "<=", 1)
    assert (claim.measured, claim.note, claim.verdict) == (0.9, "case 0.9", PROVED)
    claim = proved_for_all("x", "Thm.", rows, lambda r: r["v"], ">=", 0.2)
    assert (claim.measured, claim.verdict) == (0.1, VIOLATED)
    assert claim.sentence() == "Thm.: x: measured 0.1, required >= 0.2 (case 0.1)"
    assert proved_for_all("x", "Thm.", rows, lambda r: r["v"], "==", 0.1).measured == 0.9


def test_nan_violates_every_claim():
    for value in (math.nan, None):  # and what NaN becomes in a part that is kept
        rows = [{"case": "fine", "v": 0.0}, {"case": "nan", "v": value}]
        for relation in ("<=", "<", ">=", ">", "=="):
            assert proved("x", "Thm.", value, relation, 0).verdict == VIOLATED
            claim = proved_for_all("x", "Thm.", rows, lambda r: r["v"], relation, 0)
            assert (claim.note, claim.verdict) == ("nan", VIOLATED) and "measured nan" in claim.sentence()


def test_the_verdict_of_an_experiment_hides_no_claim():
    """One claim that is reproduced says nothing for those that are not."""

    def verdict(*verdicts: str) -> str:
        return Result([Claim("s", "Fig.", 1, ">", 0, v) for v in verdicts], [], {}, None).verdict

    assert verdict(NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED) == "claims: 2 not reproduced, 1 reproduced"
    assert verdict(PROVED, NOT_REPRODUCED) == "1 of 1 proved claims hold; other claims: 1 not reproduced"
    assert verdict(PROVED, VIOLATED) == "1 of 2 proved claims hold"


def test_spread_counts_failures_as_infinitely_bad():
    assert vars(spread([3.0, 1.0, 2.0])) == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert spread([1.0, None, math.nan]).median == math.inf
    assert spread([1.0, 2.0, 3.0, None]).median == 2.5
    assert str(spread([0.5])) == "0.5 [0.5, 0.5]"


def test_sign_test_counts_coin_flips():
    assert sign_test(8, 8) == 1 / 256
    assert sign_test(0, 8) == 1
    assert sign_test(7, 8) == 9 / 256


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (1.0, "1"),
        (0.12345, "0.123"),
        (1e-5, "1.0e-5"),
        (123456.7, "1.2e5"),
        (16384, "16384"),
        (None, "-"),
        (1574.6, "1575"),
        (999.7, "1000"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_json_has_no_word_for_nan():
    assert to_json({1: (math.nan, math.inf, 1.5, 2, True, "a", None)}) == {"1": [None, None, 1.5, 2, True, "a", None]}


def test_kept_parts_are_for_one_fingerprint(tmp_path):
    path = tmp_path / "x.parts.json"
    kept = KeptParts(path, "a")
    assert kept.keep("one", {"v": (1.5, math.nan)}, 0.25, 2) == {"v": [1.5, None]}
    assert KeptParts(path, "a").values == {"one": {"v": [1.5, None]}}
    assert KeptParts(path, "a").seconds == {"one": 0.25} and KeptParts(path, "a").threads == {"one": 2}
    assert KeptParts(path, "b").values == {} and not path.exists()
    for broken in ("", "{", "[]", '{"fingerprint": "a"}', '{"fingerprint": "a", "parts": {"one": 1}}'):
        path.write_text(broken)
        assert KeptParts(path, "a").values == {}
        assert not path.exists()


def test_parts_are_kept_for_one_build(tmp_path, monkeypatch):
    """What was solved by the reference, or before a build of the library, is no part of a run by this one."""
    settings = REGISTRY["regions"].settings(level="quick")
    built, other = tmp_path / "libdeq.so", tmp_path / "other.so"
    built.write_bytes(b"a")
    other.write_bytes(b"b")
    seen = set()
    for compiled, path in ((object(), built), (object(), other), (None, built)):
        monkeypatch.setattr(_library, "compiled", compiled)
        monkeypatch.setattr(_library, "path", path)
        _code_digest.cache_clear()
        seen.add(parts_path(tmp_path, "regions", settings))
    _code_digest.cache_clear()
    assert len(seen) == 3


def test_settings_take_defaults_and_refuse_what_cannot_run():
    steep, regions = REGISTRY["steep"], REGISTRY["regions"]
    assert steep.settings().seeds == 8 and steep.settings(level="quick").seeds == 3
    assert steep.settings(width=7).width == 7
    for options in ({"width": 0}, {"seeds": 0}, {"seed": -1}):
        with pytest.raises(SettingsError, match=next(iter(options))):
            steep.settings(**options)
    with pytest.raises(SettingsError, match="at most 1000; got 1001"):
        regions.settings(width=1001)
    assert steep.settings(seed=LARGEST_SEED).seed == LARGEST_SEED
    with pytest.raises(SettingsError, match=f"seed must be at least 0 and at most {LARGEST_SEED}; got {2**64}"):
        steep.settings(seed=2**64)
    assert json.dumps(vars(steep.settings()))


@pytest.mark.parametrize("name", [name for name, e in REGISTRY.items() if e.holds])
def test_what_memory_cannot_hold_is_refused_with_the_largest_width_that_it_may(name, monkeypatch):
    """The usual runs of every level take less than 2 GiB."""
    if REGISTRY[name].missing:
        pytest.skip(REGISTRY[name].missing)
    monkeypatch.setattr("deq.experiments._run.memory", lambda device: 2**31)
    for level in LEVELS:
        REGISTRY[name].settings(level=level)
    with pytest.raises(SettingsError, match=r"not enough memory for width 30000\d* with 9 seed") as refused:
        REGISTRY[name].settings(width=30000 * (1000 if name == "bias" else 1), seeds=9)
    widest = int(str(refused.value).split()[-1])
    REGISTRY[name].settings(width=widest, seeds=9)
    with pytest.raises(SettingsError, match="not enough memory"):
        REGISTRY[name].settings(width=widest + 1, seeds=9)


def test_tables_break_no_word_and_align_numbers_beside_blanks():
    rows = [("contractive DEQ 8", "0.12 [0.1, 0.2]", "1.5"), ("feed-forward 8x3 (memory)", "0.34 [0.3, 0.4]", "")]
    console = Console(file=StringIO(), width=80)
    for size in (3, 12):  # with room for whole words, and without
        wide = Table("Wide", ("model", *["MSE over seeds"] * size, "x10"), [(r[0], *[r[1]] * size, r[2]) for r in rows])
        console.file = StringIO()
        console.print(_rich(wide, 80))
        words = console.file.getvalue().split()
        assert all(word in words for word in ("contractive", "feed-forward", "(memory)")) == (size == 3)
        assert "1.5" in words
        assert max(len(line.rstrip()) for line in console.file.getvalue().splitlines()) <= 80
    console.print(_rich(Table("Blank", ("model", "multiples"), [("a", "1.5"), ("b", "")]), 80))
    assert " a           1.5\n" in console.file.getvalue().replace(" \n", "\n")  # below the end of its column's name


def test_the_registry_is_named_after_itself():
    assert all(name == e.name and e.title and e.claim.endswith(".") for name, e in REGISTRY.items())


@pytest.fixture
def draws_say_where(monkeypatch):
    """A generator of a GPU fills no tensor of the CPU: what draws from one of the run's device has to name the device.
    Here, where it may be the CPU, the call is an error without."""
    of_device = set()
    generator = Run.generator

    def made(run: Run, purpose: str, device=None) -> torch.Generator:
        found = generator(run, purpose, device)
        if device is None:
            of_device.add(found)
        return found

    monkeypatch.setattr(Run, "generator", made)

    def checked(draw):
        def drawn(*arguments, **options):
            assert options.get("generator") not in of_device or options.get("device") is not None
            return draw(*arguments, **options)

        return drawn

    for draw in (torch.rand, torch.randn, torch.randint, torch.randperm):
        monkeypatch.setattr(torch, draw.__name__, checked(draw))


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_experiment_runs_at_its_smallest_width(name, tmp_path, draws_say_where):
    """One neuron, one seed, a few steps: every proved claim still holds, and nothing is judged."""
    if REGISTRY[name].missing:
        pytest.skip(REGISTRY[name].missing)
    settings = REGISTRY[name].settings(width=REGISTRY[name].smallest_width, seeds=1, level="quick")
    result = execute(REGISTRY[name], settings, tmp_path, Console(file=StringIO(), width=80))
    assert not result.violated
    assert {c.verdict for c in result.claims if c.seeds} <= {NOT_JUDGED}
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["config"].keys() == REGISTRY[name].config.keys()
    assert all(choice["why"] for choice in record["config"].values())
