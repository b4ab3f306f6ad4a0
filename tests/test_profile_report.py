"""What a profile shows: its text within 80 columns, its JSON, its roofline figure, and the command."""

import json

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from matplotlib.image import imread
from profiles import CEILINGS, leaves, profile
from rich.console import Console

import deq
from deq import _library, weights
from deq.cli import main
from deq.profiling import ceilings, feed_forward, roofline, tables
from deq.profiling.report import Seconds

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def test_report_json_text_and_figure(tmp_path):
    W, c = leaves(64, 32)
    report = profile(deq.solve, W, c, feed_forward=2)
    record = json.loads(json.dumps(report.as_dict()))
    assert [one["pass"] for one in record["passes"]] == ["forward", "backward"]
    assert sum(record["passes"][0]["iterations"].values()) == 32
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("useful FLOPs", "Iterations of 32 samples", "peak, forward + backward", "FLOPs / iteration"):
        assert words in text
    report.draw(tmp_path / "roofline.png")
    picture = imread(tmp_path / "roofline.png")[..., :3]
    assert 0.01 < (picture.min(-1) < 0.9).mean() < 0.5


def test_half_precisions_have_ceilings_and_feed_forward_nets_of_their_own(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        W, c = leaves(16, 8, dtype)
        report = profile(deq.solve, W, c, feed_forward=2)
        name = str(dtype).removeprefix("torch.")
        assert name in report.passes[1].counts.executed and name in str(report)
        assert len(report.beside) == 3
        assert all(net.retained == pytest.approx(2 * 8 * net.width * 2, rel=0.3) for net in report.beside)
        report.draw(tmp_path / "roofline.png")
    assert set(roofline.PRECISION_COLOURS) == set(CEILINGS.flops)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_products_without_a_ceiling_are_counted_and_take_no_share(dtype, tmp_path):
    """A block with a Fourier layer multiplies complex matrices, which no ceiling is measured for."""
    W, c = leaves(16, 8)
    spectrum = torch.ones(8, 8, dtype=dtype)
    alone, both = (profile(f, W, c) for f in (deq.solve, lambda W, c: (deq.solve(W, c), spectrum @ spectrum)))
    one = both.passes[0]
    name = str(dtype).removeprefix("torch.")
    assert one.counts.executed[name] == 2 * 8**3 and f"of them {name}" in str(both)
    known = alone.passes[0].executed / CEILINGS.flops["float32"]
    assert one.arithmetic_share(CEILINGS) == pytest.approx(known / one.seconds.median)
    assert one.arithmetic_ceiling(CEILINGS) == CEILINGS.flops["float32"]
    json.dumps(both.as_dict())
    both.draw(tmp_path / "roofline.png")


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("batch", [0, 3])
def test_a_figure_of_passes_without_flops(m, batch, tmp_path, monkeypatch):
    labels = []
    told = lambda figure, **_: labels.extend(figure.axes[0].get_legend_handles_labels()[1])  # noqa: E731
    monkeypatch.setattr(Figure, "legend", told)
    d, c = torch.full((m,), 0.5, requires_grad=True), torch.ones(batch, m, requires_grad=True)
    report = profile(deq.solve, weights.Diagonal(d), c)
    report.draw(tmp_path / "roofline.png")
    assert labels[-2:] == ["forward: no FLOPs", "backward: no FLOPs"]
    assert imread(tmp_path / "roofline.png").min() < 0.5


def test_command(tmp_path):
    arguments = ["profile", "--width", "48", "--batch", "16", "--seconds", "0.01", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["shapes"] == [[16, 48]] and record["versions"]["deq"] == deq.__version__
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    lines = [line for line in result.output.splitlines() if not line.startswith("Written to")]
    assert max(len(line.rstrip()) for line in lines) <= 80
    text = " ".join(CliRunner().invoke(main, ["profile", "--help"]).output.split())
    assert "gaussian, radius, orthogonal, symmetric, outlier, monotone, trained" in text
    bad = CliRunner().invoke(main, ["profile", "--family", "gausian", "--out", str(tmp_path)])
    assert bad.exit_code == 2 and "family must be one of" in bad.output
    bad = CliRunner().invoke(main, ["profile", "--activation", "gelu", "--solver", "cayley", "--out", str(tmp_path)])
    assert bad.exit_code == 2 and "nondecreasing" in bad.output


def test_the_command_tells_what_it_measured_where_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deq.cli.replace_text", full)
    arguments = ["profile", "--width", "16", "--batch", "4", "--seconds", "0.01", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "No space left on device" in result.stderr and "GFLOP/s" in result.stdout


@pytest.mark.parametrize(("family", "fails"), [("radius3", True), ("gaussian", False)])
def test_the_command_says_what_it_did_not_solve(family, fails, tmp_path):
    arguments = ["--width", "16", "--batch", "4", "--family", family, "--solver", "plain", "--seconds", "0.01"]
    result = CliRunner().invoke(main, ["profile", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert ("4 of 4 samples did not converge" in result.output) == fails == ("DIVERGED" in result.output)


def test_the_report_where_nothing_but_ascii_can_be_printed(tmp_path):
    W, c = leaves(16, 6)
    report = profile(deq.solve, W, c)
    assert "█" in str(report)
    with open(tmp_path / "report.txt", "w", encoding="ascii") as file:
        Console(file=file, width=80).print(report)
    assert "#" in (tmp_path / "report.txt").read_text()


def test_files_are_written_before_the_report_is_printed(tmp_path, monkeypatch):
    def broken(report, ascii_only):
        raise UnicodeEncodeError("ascii", "x", 0, 1, "of this terminal")

    monkeypatch.setattr(tables, "tables", broken)
    arguments = ["profile", "--width", "8", "--batch", "2", "--seconds", "0.01", "--out", str(tmp_path)]
    assert isinstance(CliRunner().invoke(main, arguments).exception, UnicodeEncodeError)
    assert (tmp_path / "profile.json").exists() and (tmp_path / "profile.png").exists()


@needs_library
def test_ceilings_are_measured_once():
    found = ceilings()
    assert found is ceilings()
    assert found.flops["float32"] > found.flops["float64"] > 1e9
    assert set(found.flops) == set(CEILINGS.flops)
    assert all(rate > 1e8 for rate in found.bandwidth.values())
    assert found.bandwidth_for(1)[0] == "cache" and found.bandwidth_for(1 << 40)[0] == "memory"


def test_numbers_with_prefixes():
    shown = [tables.si(x, "B") for x in (0, 1, 12, 999.9, 1500, 123456, 1.5e9, 0.0012)]
    assert shown == ["0 B", "1 B", "12 B", "1.00 kB", "1.50 kB", "123 kB", "1.50 GB", "1.20 mB"]
    assert [tables.si(x, "s") for x in (1e-9, 0.6e-6, 48.3e-3)] == ["0 s", "0 s", "48.3 ms"]
    spread = tables._spread(Seconds(656e-6, 61.5e-6, 48.3e-3))
    assert spread == "656 us (61.5 to 48300)"
    assert tables.si(None) == "" and feed_forward.CLOSE < 0.05
