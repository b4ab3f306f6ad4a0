"""The command line: experiments end to end in their quick form, exit codes, interruption, results run again."""

import hashlib
import json
import os
import re
import subprocess
import sys
import wave
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from commands import deq_command
from markupsafe import escape
from matplotlib.image import imread

import deq
from deq.experiments import REGISTRY, audio, regions, steep
from deq.experiments._result import Claim
from deq.experiments._run import SCHEMA
from deq.experiments._steep_target import SelfLoops


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """A few steps: what is tested here does not depend on how well the nets learn."""
    monkeypatch.setattr(steep, "QUICK_STEPS", 12)
    monkeypatch.setattr(steep, "QUICK_WIDE", (64,))


def check_record(out: Path, name: str) -> dict:
    """The JSON has the schema that all experiments share, the figure shows something, the report refers to both."""
    text = (out / f"{name}.json").read_text()
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert record["schema"] == SCHEMA and record["experiment"] == name
    assert set(record["settings"]) == {"width", "depth", "seed", "seeds", "device", "level", "input"}
    assert record["provenance"]["versions"]["deq"] == deq.__version__
    for claim in record["claims"]:
        assert set(claim) == {field.name for field in fields(Claim)}
    for table in record["tables"]:
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    picture = imread(out / f"{name}.png")
    assert picture.shape[1] == 1200  # 10 inches
    thirds = (picture[:, i * 400 : (i + 1) * 400, :3] for i in range(3))
    assert all((third.min(-1) < 0.9).mean() > 0.01 for third in thirds)  # no panel is blank
    report = (out / f"{name}.md").read_text()
    assert f"({name}.png)" in report and record["verdict"] in report
    assert all(claim["statement"].replace("|", "\\|") in report for claim in record["claims"])
    assert sorted(p.name for p in out.iterdir()) == [f"{name}.json", f"{name}.md", f"{name}.png"]
    return record


def test_steep_quick(tmp_path):
    result = deq_command("run", "steep", "--quick", "--seeds", 2, "--width", 6, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = check_record(tmp_path, "steep")
    expected = {"width": 6, "depth": None, "seed": 0, "seeds": 2, "device": "cpu", "level": "quick", "input": None}
    assert record["settings"] == expected
    verdicts = [c["verdict"] for c in record["claims"]]
    assert verdicts.count("proved") == 14 and verdicts.count("not judged") == 4 and len(verdicts) == 18
    for row in record["values"]["trained"]:
        assert len(row["mse"]) == len(row["sup"]) == 2
        assert row["history"][0]["step"] == 0 and row["history"][-1]["step"] == 12
        assert row["summary"]["mse"]["low"] <= row["summary"]["mse"]["median"] <= row["summary"]["mse"]["high"]
        if "DEQ" in row["model"]:  # every equilibrium row shows its residual and what more evaluations change
            evidence = row["equilibrium"]
            assert evidence["residual"] <= 1e-10 and evidence["residual_again"] <= 1e-13
            assert evidence["metric_again"] == pytest.approx(evidence["metric_used"], rel=1e-6)
    assert all(len(line.rstrip()) <= 80 for line in result.output.splitlines() if not line.startswith("Wrote "))
    assert "Verdict: 14 of 14 proved claims hold" in result.output


def test_regions_quick(tmp_path):
    result = deq_command("run", "regions", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = check_record(tmp_path, "regions")
    assert [row["regions"] for row in record["values"]["counted"]] == [2**m for m in range(1, 11)]
    assert all(len(line.rstrip()) <= 80 for line in result.output.splitlines() if not line.startswith("Wrote "))
    exact = {name: max(r["m"] for r in rows if r["wrong"] == 0) for name, rows in record["values"]["solved"].items()}
    assert exact == {"float32": 23, "float64": 52}


@pytest.mark.parametrize("name", ["runs[bold]", "runs[/bold]"])
def test_a_folder_may_be_named_like_a_tag_of_rich(name, tmp_path):
    result = deq_command("run", "regions", "--quick", "--width", 2, "--out", tmp_path / name)
    assert result.exit_code == 0 and f"Wrote {tmp_path / name / 'regions'}.json" in result.output


def test_regions_samples_where_it_cannot_count(tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "EXACT", 5)
    result = deq_command("run", "regions", "--quick", "--width", 33, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = check_record(tmp_path, "regions")
    assert len(record["values"]["counted"]) == 5
    assert [row["m"] for row in record["values"]["sampled"]] == [7, 10, 14, 20, 33]
    assert "regions a width sampled in integers, not counted" in " ".join(result.output.split())
    assert any("sampled" in c["statement"] and c["verdict"] == "proved" for c in record["claims"])


def test_regions_of_one_neuron(tmp_path):
    result = deq_command("run", "regions", "--width", 1, "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output


def test_a_broken_construction_is_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr(SelfLoops, "readout", lambda self, z: self.y0 + 0.1 + z.sum(-1))
    result = deq_command("run", "steep", "--quick", "--seeds", 1, "--width", 3, "--out", tmp_path)
    assert result.exit_code == 1
    sentence = "steep: this proved claim does not hold: Thm. 2: A: K^2 x sup error: measured "
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(sentence)]
    assert line.endswith("required <= 1 (d = 20, K = 64).")
    assert float(line.removeprefix(sentence).split(",")[0]) > 50
    record = check_record(tmp_path, "steep")
    assert "violated" in [c["verdict"] for c in record["claims"]]


def test_a_broken_weight_is_exit_code_1(tmp_path, monkeypatch):
    right = regions.weight
    monkeypatch.setattr(regions, "weight", lambda m, dtype: 0.5 * right(m, dtype))
    monkeypatch.setattr("deq.experiments.REGISTRY", {name: REGISTRY[name] for name in ("steep", "regions")})
    result = deq_command("run", "all", "--quick", "--seeds", 1, "--width", 3, "--out", tmp_path)
    assert result.exit_code == 1
    assert "regions: this proved claim does not hold: Thm. 1: float32, m <= 23: inexact solves" in result.stderr
    assert "steep: " not in result.stderr and (tmp_path / "steep.json").exists()


def test_interruption_keeps_parts_and_the_next_run_resumes(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    arguments = ("run", "steep", "--quick", "--seeds", 1, "--width", 3)
    assert deq_command(*arguments, "--out", whole).exit_code == 0

    train_one, calls = steep.train_one, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_one(*arguments)

    monkeypatch.setattr(steep, "train_one", counted)
    out = tmp_path / "out"
    result = deq_command(*arguments, "--out", out)
    assert result.exit_code == 130
    assert "Interrupted steep: finished parts are kept in" in result.stderr
    assert "the same command resumes them" in result.stderr
    (kept,) = out.iterdir()
    assert re.fullmatch(r"steep\.[0-9a-f]{8}\.parts\.json", kept.name) and str(kept) in result.stderr
    stored = json.loads(kept.read_text())
    kept.write_text(json.dumps(stored | {"threads": dict.fromkeys(stored["threads"], 7)}))

    calls[:] = [1] * 10
    other = deq_command(*arguments, "--seed", 1, "--out", out)  # other settings: nothing to resume, nothing to forget
    assert other.exit_code == 0 and "Resuming" not in other.output
    assert [p.name for p in out.glob("*.parts.json")] == [kept.name]
    calls[:] = [1] * 10
    result = deq_command(*arguments, "--out", out)
    assert result.exit_code == 0
    assert "Resuming: 11 of 18 parts are kept from an earlier run." in result.output
    assert len(calls) == 10 + 7
    resumed = check_record(out, "steep")
    assert len(resumed["provenance"]["resumed_parts"]) == 11 and resumed["provenance"]["threads"] == 7
    expected = json.loads((whole / "steep.json").read_text())
    assert resumed["values"] == expected["values"] and resumed["claims"] == expected["claims"]


def test_interruption_before_anything_is_finished(tmp_path, monkeypatch):
    def interrupted(d, K, device):
        raise KeyboardInterrupt

    monkeypatch.setattr(steep, "check_self_loops", interrupted)
    result = deq_command("run", "steep", "--quick", "--out", tmp_path)
    assert result.exit_code == 130 and "no part was finished" in result.stderr


def test_list_info_version_and_help():
    listed = deq_command("run", "--list")
    assert listed.exit_code == 0
    column = max(map(len, REGISTRY)) + 2
    assert all(f"{name:<{column}}{e.title}" in listed.output.splitlines() for name, e in REGISTRY.items())
    assert {line[:column].strip() for line in listed.output.splitlines()} == {"", *REGISTRY}
    assert all(name in listed.output and e.title in listed.output for name, e in REGISTRY.items())
    assert max(map(len, listed.output.splitlines())) <= 80
    info = deq_command("info")
    assert info.exit_code == 0 and info.output == f"{deq.info()}\n"
    assert deq_command("--version").output == f"deq, version {deq.__version__}\n"
    assert "run" in deq_command("--help").output and "--quick" in deq_command("run", "--help").output


def test_a_result_is_run_again_as_it_says(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    assert deq_command("run", "regions", "--quick", "--width", 3, "--seed", 5, "--out", first).exit_code == 0
    path = first / "regions.json"
    result = deq_command("run", path, "--out", again)
    assert result.exit_code == 0 and "Every value is the recorded one." in result.output
    record = json.loads(path.read_text())
    assert json.loads((again / "regions.json").read_text())["settings"] == record["settings"]
    record["values"]["counted"][0]["regions"] = 7
    record["claims"][0]["measured"] = 7.0
    path.write_text(json.dumps(record))
    result = deq_command("run", path, "--out", again)
    assert result.exit_code == 0 and "linear regions / 2^m: 7.0 was recorded, 1.0 measured" in result.output
    first, *others = record["claims"]  # those of a version with other claims: each is compared with itself
    path.write_text(json.dumps(record | {"claims": [first | {"statement": "lines"}, *reversed(others)]}))
    lines = [line.strip() for line in deq_command("run", path, "--out", again).output.splitlines()]
    assert "lines: this version of deq makes no such claim" in lines
    assert "linear regions / 2^m: the version of deq that wrote the record made no such claim" in lines
    assert not [line for line in lines if "was recorded" in line]
    for arguments, words in ((("--width", 2), "leave out --width"), (("--quick",), "leave out --quick")):
        result = deq_command("run", path, *arguments)
        assert result.exit_code == 2 and words in result.stderr
    for text in ("{", "[]", '{"experiment": "nothing", "settings": {}}'):
        path.write_text(text)
        result = deq_command("run", path)
        assert result.exit_code == 2 and "regions.json" in result.stderr


# Of a record, beside its settings.
WHOLE = {"width": 2, "depth": 3, "seed": 0, "seeds": 1, "device": "cpu", "level": "quick", "input": None}
REST = {"schema": SCHEMA, "experiment": "audio", "values": {}, "claims": [], "provenance": {"versions": {}}}


@pytest.mark.parametrize(
    "record, words",
    [
        ({}, 'it has no "experiment"'),
        ([1], 'it has no "experiment"'),
        ({"experiment": "steep"}, 'it has no "settings"'),
        ({"experiment": "steeper", "settings": {}}, "there is no experiment 'steeper'"),
        ({"experiment": "steep", "settings": {}}, "it has schema None, and this one reads"),
        (REST | {"schema": 1, "settings": {"quick": True}}, "another version of deq wrote it: it has schema 1, and"),
        (REST | {"settings": {"foo": 1}}, "its settings hold 'foo', which audio does not have"),
        (REST | {"settings": WHOLE, "provenance": None}, 'it has no "provenance"'),
        (REST | {"settings": WHOLE, "provenance": {}}, 'its "provenance" has no "versions"'),
        (REST | {"settings": WHOLE, "claims": [{"statement": "s"}]}, 'one of its "claims" lacks a "statement" or'),
        (REST | {"settings": WHOLE | {"width": "a"}}, "audio: width must be an integer; got 'a'"),
        (REST | {"settings": WHOLE | {"seed": True}}, "audio: seed must be an integer; got True"),
        (
            REST | {"settings": WHOLE | {"level": "brief"}},
            "audio: level must be one of quick, default, full; got 'brief'",
        ),
        (REST | {"settings": WHOLE | {"device": 3}}, "must be cpu, cuda or cuda:N; got 3"),
        (REST | {"settings": WHOLE | {"input": 3}}, "audio: input must be the path of a file; got 3"),
        (REST | {"settings": {}}, 'its settings lack "width"'),
        (REST | {"settings": {k: v for k, v in WHOLE.items() if k != "seed"}}, 'its settings lack "seed"'),
        (REST | {"settings": WHOLE | {"depth": None}}, 'its settings lack "depth"'),
    ],
)
def test_a_result_that_does_not_fit_is_refused(record, words, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(record))
    result = deq_command("run", path, "--out", tmp_path)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_a_result_that_is_not_there_is_named(tmp_path):
    result = deq_command("run", "nope.json", "--out", tmp_path)
    assert result.exit_code == 2 and "there is no file nope.json." in result.stderr


@pytest.mark.parametrize(
    "where, arguments",
    [("deq.profile", ("profile", "--width", 8, "--batch", 2)), ("deq.bench.memory.measure", ("bench", "memory"))],
)
def test_ctrl_c_is_exit_code_130_everywhere(where, arguments, tmp_path, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    monkeypatch.setattr("deq.bench.cli._need_compiled", lambda: None)
    monkeypatch.setattr("deq.profiling.memory.can_measure", lambda: True)
    result = deq_command(*arguments, "--out", tmp_path)
    assert result.exit_code == 130 and "Interrupted" in result.stderr


@pytest.mark.parametrize("arguments", [("run", "--list"), ("run", "regions", "--quick", "--width", "2")])
def test_a_reader_that_has_gone_is_no_theorem_that_failed(arguments, tmp_path):
    """Whether click prints or rich: ``deq run ... | head``."""
    reading, end = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "deq.cli", *arguments]
    out = ("--out", tmp_path) if "--quick" in arguments else ()
    done = subprocess.run([*command, *out], stdout=end, stderr=subprocess.PIPE, text=True)
    os.close(end)
    assert (done.returncode, done.stderr) == (141, "")


def test_all_writes_the_ledger_and_forgets_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("deq.experiments.REGISTRY", {name: REGISTRY[name] for name in ("regions", "density")})
    result = deq_command("run", "all", "--quick", "--seeds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = [f"{name}.{ending}" for name in ("density", "regions") for ending in ("json", "md", "png")]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*names, "README.md", "index.html"))
    page, text = ((tmp_path / name).read_text() for name in ("index.html", "README.md"))
    for name in ("regions", "density"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert f'id="{name}"' in page and f"## {name}: " in text and f"]({name}.png)" in text
        for claim in record["claims"]:
            assert claim["statement"].replace("|", "\\|") in text and str(escape(claim["statement"])) in page
    assert page.count("data:image/png;base64,") == 2
    assert "src=" not in page.replace('src="data:', "") and "<link" not in page  # it needs no other file


def test_what_needs_a_missing_package_says_so_and_is_left_out_of_all(tmp_path, monkeypatch):
    lacking = replace(REGISTRY["saliency"], needs=("no-such-package",))
    monkeypatch.setattr("deq.experiments.REGISTRY", {"regions": REGISTRY["regions"], "saliency": lacking})
    sentence = "saliency: needs no-such-package, not installed here; pip install 'deq-engine[experiments]'"
    result = deq_command("run", "saliency", "--quick", "--out", tmp_path)
    assert result.exit_code == 2 and sentence in " ".join(result.stderr.split())
    result = deq_command("run", "all", "--quick", "--width", 2, "--out", tmp_path)
    assert result.exit_code == 0 and f"Left out: {sentence}." in result.stderr
    assert not (tmp_path / "saliency.json").exists()


@pytest.mark.parametrize("text", [json.dumps({"schema": 1, "experiment": "saliency"}), "{", "[]", None])
def test_the_ledger_leaves_out_what_is_no_record_of_this_version(text, tmp_path, monkeypatch):
    """None: a record whose figure is gone."""
    lacking = replace(REGISTRY["saliency"], needs=("no-such-package",))
    monkeypatch.setattr("deq.experiments.REGISTRY", {"regions": REGISTRY["regions"], "saliency": lacking})
    (tmp_path / "saliency.json").write_text(text or json.dumps({"schema": SCHEMA, "experiment": "saliency"}))
    result = deq_command("run", "all", "--quick", "--width", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.exception
    text = (tmp_path / "README.md").read_text()
    assert "## regions: " in text and "saliency" not in text


def test_input_is_for_those_that_read_one(tmp_path):
    path = tmp_path / "x.wav"
    path.write_text("no sound")
    result = deq_command("run", "regions", "--input", path, "--out", tmp_path)
    assert result.exit_code == 2 and "regions: reads no input" in result.stderr
    result = deq_command("run", "audio", "--quick", "--input", path, "--out", tmp_path)
    assert result.exit_code == 2 and "no WAV file that can be read" in result.stderr
    path.write_bytes(b"")
    result = deq_command("run", "audio", "--quick", "--input", path, "--out", tmp_path)
    assert result.exit_code == 2 and "that can be read: it ends too early." in " ".join(result.stderr.split())
    result = deq_command("run", "audio", "--input", tmp_path / "none.wav", "--out", tmp_path)
    assert result.exit_code == 2 and "--input" in result.stderr


def write_sound(path, pitch):
    sound = (8000 * np.sin(pitch * np.arange(20_000))).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8192, 0, "NONE", ""))
        file.writeframes(sound.tobytes())


def test_an_input_is_what_the_file_holds(tmp_path, monkeypatch):
    """Parts that were finished for another sound are not taken for parts of this one, under whatever name it comes."""
    fit, calls = audio.fit, []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(audio, "fit", counted)
    path, moved = tmp_path / "a.wav", tmp_path / "b.wav"
    write_sound(path, 0.1)
    run = lambda *arguments: deq_command("run", *arguments, "--out", tmp_path)  # noqa: E731
    arguments = ("audio", "--quick", "--width", 2, "--seeds", 1, "--input")
    assert run(*arguments, path).exit_code == 130
    calls[:] = [1] * 10
    path.rename(moved)
    write_sound(path, 0.2)
    other = run(*arguments, path)
    assert other.exit_code == 0 and "Resuming" not in other.output
    record = json.loads((tmp_path / "audio.json").read_text())
    assert record["provenance"]["input_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "Resuming: 1 of" in run(*arguments, moved).output
    (tmp_path / "recorded.json").write_text(json.dumps(record))
    assert "has changed" not in run(tmp_path / "recorded.json").output
    write_sound(path, 0.1)
    again = " ".join(run(tmp_path / "recorded.json").output.split())
    assert "Values differ" in again and "a.wav has changed: sha256" in again
    path.unlink()
    gone = run(tmp_path / "recorded.json")
    assert gone.exit_code == 2 and "a.wav: No such file" in " ".join(gone.stderr.split())


def test_depth_is_for_those_that_have_it(tmp_path):
    result = deq_command("run", "regions", "--depth", 3, "--out", tmp_path)
    assert result.exit_code == 2 and "regions: has no depth to set; got 3" in result.stderr
    result = deq_command("run", "regions", "--quick", "--full", "--out", tmp_path)
    assert result.exit_code == 2 and "--quick and --full exclude each other" in result.stderr


def test_the_same_command_gives_the_same_values(tmp_path):
    arguments = ("run", "regions", "--quick", "--width", 2, "--out", tmp_path)
    assert deq_command(*arguments).exit_code == 0
    first = json.loads((tmp_path / "regions.json").read_text())["values"]
    assert deq_command(*arguments).exit_code == 0
    assert json.loads((tmp_path / "regions.json").read_text())["values"] == first
