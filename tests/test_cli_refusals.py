"""What the command line refuses and says so: bad options, sizes without memory, folders that cannot be written to."""

import importlib
from dataclasses import replace

import pytest
from commands import deq_command

from deq import _library
from deq.experiments import REGISTRY
from deq.files import writing


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("steep", "--width", "0"), ("--width", "0 is not in the range x>=1")),
        (("steep", "--width", "ten"), ("--width", "ten")),
        (("steep", "--seeds", "0"), ("--seeds", "x>=1")),
        (("steep", "--seed", "-1"), ("--seed", "x>=0")),
        (("steep", "--device", "tpu"), ("--device", "cpu, cuda or cuda:N", "tpu")),
        (("steep", "--device", "cpu:1"), ("--device", "cpu:1")),
        (("regoins",), ("no experiment 'regoins'", "Did you mean 'regions'?", "regions, sawtooth, steep")),
        ((), ("name an experiment: regions, sawtooth, steep",)),
        (("all", "--width", "5000"), ("regions: width must be at least 1 and at most 1000; got 5000",)),
        (
            ("steep", "--width", "10000000"),
            ("steep: width must be at least 1 and at most 32768, where", "GiB a seed; got"),
        ),
        (("gotu", "--quick", "--width", "10000000"), ("gotu: not enough memory for width 10000000", "must be at most")),
        (("features", "--quick", "--width", "10000000"), ("with 2 seed(s), which take at least", "must be at most")),
        (("density", "--quick", "--width", str(10**20)), ("density: not enough memory for", "must be at most")),
        (("bias", "--width", str(10**20)), ("bias: not enough memory for width 1000", "must be at most")),
        (("density", "--seeds", "10000000000"), ("density: seeds must be at least 1 and at most 10000; got 1000",)),
        (("density", "--width", "8"), ("density: width must be at least 16; got 8",)),
        (("steep", "--wdith", "3"), ("--wdith", "--width")),
    ],
)
def test_bad_options_are_named(arguments, words, tmp_path):
    result = deq_command("run", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(_library.compiled is None, reason="benchmarks need the compiled library")
@pytest.mark.parametrize(
    "command",
    [
        ("bench", "cpu", "--case", "100000000,3"),
        ("profile", "--width", 10**8),
        ("profile", "--width", 8, "--batch", 10**20),
        ("run", "sawtooth", "--quick", "--depth", 10**12),  # of a list in Python: an error without words
        ("run", "sawtooth", "--quick", "--depth", 10**20),
    ],
)
def test_a_size_that_no_memory_holds_is_said(command, tmp_path):
    result = deq_command(*command, "--out", tmp_path)
    assert result.exit_code == 2 and "Error: not enough memory for this size" in result.stderr


@pytest.mark.skipif(_library.compiled is None, reason="benchmarks need the compiled library")
@pytest.mark.parametrize("command", ["cpu", "digits", "seeds", "steep", "peers"])
def test_more_threads_than_a_process_can_have_are_refused(command, tmp_path):
    """torch's error of a number beyond 32 bits was a traceback; some thousands ended the process in OpenMP."""
    result = deq_command("bench", command, "--threads", 99999999999, "--out", tmp_path / "out")
    words = "Invalid value for '--threads': 99999999999 is not in the range 1<=x<=1024."
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())


@pytest.mark.skipif(_library.compiled is None, reason="benchmarks need the compiled library")
@pytest.mark.parametrize("command", [("bench", "cpu", "--case", "17,5"), ("bench", "peers"), ("profile", "--width", 8)])
@pytest.mark.parametrize("seconds", ["inf", "nan"])
def test_seconds_without_an_end_are_refused(command, seconds, tmp_path):
    result = deq_command(*command, "--seconds", seconds, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"Invalid value for '--seconds': {seconds} is no finite number." in " ".join(result.stderr.split())


def test_cuda_without_a_gpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = deq_command("run", "steep", "--device", "cuda", "--out", tmp_path)
    assert result.exit_code == 2 and "no CUDA GPU" in result.stderr


def test_out_that_cannot_be_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        result = deq_command("run", "steep", "--out", out)
        assert result.exit_code == 2 and "--out" in result.stderr


@pytest.mark.skipif(_library.compiled is None, reason="benchmarks need the compiled library")
@pytest.mark.parametrize("command", ["cpu", "memory", "digits", "seeds", "steep", "peers"])
def test_benchmarks_find_a_folder_that_cannot_be_written_to_before_they_measure(command, tmp_path, monkeypatch):
    pytest.importorskip({"digits": "sklearn", "peers": "torchdeq"}.get(command, "deq"))
    module = importlib.import_module(f"deq.bench.{'run' if command == 'cpu' else command}")
    name = {"cpu": "Run.steps", "peers": "steps"}.get(command, "measure")
    monkeypatch.setattr(f"{module.__name__}.{name}", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    result = deq_command("bench", command, "--out", tmp_path / "file" / "below")
    assert result.exit_code == 2 and "cannot write to" in result.stderr


def fails(*arguments, **keywords):
    raise OSError(28, "No space left on device")


PLACES = ["_run.replace_text", "_plot.Image.Image.save", "_ledger.replace_text", "_run.Path.unlink"]


@pytest.mark.parametrize("name", PLACES)
def test_a_folder_that_cannot_be_written_to_is_refused(name, tmp_path, monkeypatch):
    """Before anything is computed; where the disk fills up later, then."""
    monkeypatch.setattr("deq.experiments.REGISTRY", {"regions": REGISTRY["regions"]})
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", fails)
        patch.setattr("deq.experiments.execute", lambda *arguments: pytest.fail("computed"))
        result = deq_command("run", "regions", "--quick", "--out", tmp_path)
        profiled = deq_command("profile", "--width", 8, "--batch", 2, "--out", tmp_path)
    if name.endswith("replace_text"):
        monkeypatch.setattr(f"deq.experiments.{name}", writing()(fails))
    else:
        monkeypatch.setattr(f"deq.experiments.{name}", fails)
    later = deq_command("run", "all", "--quick", "--width", 2, "--out", tmp_path)
    words = f"Invalid value for '--out': cannot write to {tmp_path}: No space left on device."
    for ended in (result, profiled, later):
        assert ended.exit_code == 2 and words in " ".join(ended.stderr.split())


def test_what_an_experiment_cannot_read_is_no_matter_of_the_folder(tmp_path, monkeypatch):
    def reads(run):
        raise FileNotFoundError(2, "No such file or directory", "images")

    experiment = replace(REGISTRY["regions"], function=reads)
    monkeypatch.setattr("deq.experiments.REGISTRY", {"regions": experiment})
    ended = deq_command("run", "regions", "--quick", "--out", tmp_path)
    assert isinstance(ended.exception, FileNotFoundError) and "--out" not in ended.output


@pytest.mark.skipif(_library.compiled is None, reason="benchmarks need the compiled library")
def test_a_figure_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def steps(run):
        run.path = tmp_path / "cpu.json"
        run.results.auto.append({})
        return iter(())

    monkeypatch.setattr("deq.bench.run.Run.steps", steps)
    monkeypatch.setattr("deq.bench.report.tables", lambda results: [])
    monkeypatch.setattr("deq.bench.figure.draw", fails)
    ended = deq_command("bench", "cpu", "--out", tmp_path)
    assert ended.exit_code == 2 and "No space left on device" in ended.stderr
