"""The commands that only a machine with a GPU runs to the end, as far as they go without one: regimes, ncu, on_gpu."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from deq.bench import ncu, on_gpu, record, regimes, small_cases
from deq.bench.cli import bench
from deq.gpu_device import find_device
from deq.gpu_plan import choose


class TestRegimes:
    """Every regime on the same shape, in the interpreter."""

    def test_rows(self, tmp_path):
        arguments = ["--device", "cpu", "--case", "17,5", "--case", "70,2", "--out", str(tmp_path)]
        result = CliRunner().invoke(regimes.main, arguments)
        assert result.exit_code == 0, result.output
        rows = json.loads(next(tmp_path.glob("*/regimes.json")).read_text())
        assert [(row["m"], row["regime"]) for row in rows] == [(m, r) for m in (17, 70) for r in ("resident", "cell")]
        for row in rows:
            assert row["failed"] == 0 and row["mean_iterations"] <= row["iterations"] < 20 and row["expected_us"] > 0
            assert 0 < row["host_us"] <= row["clock_us"] and row["device_us"] is None
            assert f"{row['m']} x {row['B']}" in result.output

    def test_a_regime_is_forced_and_let_go(self):
        from deq.backends import triton_kind

        ways = []
        for regime in ("resident", "cell"):
            with regimes.forced(regime) as backend:
                assert backend == "triton"
                ways.append(triton_kind.choose(64, 4, dtype="float32", device=find_device("H200")).regime)
        assert ways == ["resident", "cell"] and triton_kind.choose is choose
        with regimes.forced("grid") as backend:
            assert backend == "cuda" and regimes.cuda.regime_for(64, 4, 0) == "grid"

    def test_what_cannot_run_is_said(self, monkeypatch, tmp_path):
        def fails(*_):
            raise RuntimeError("out of memory\nand more")

        monkeypatch.setattr(regimes, "measure", fails)
        result = CliRunner().invoke(regimes.main, ["--device", "cpu", "--case", "17,5", "--out", str(tmp_path)])
        assert result.exit_code == 0 and "17 x 5     cell           out of memory" in result.output


class TestFolder:
    """One that cannot be written to is said, before anything is measured or where the disk fills up."""

    def commands(self, monkeypatch, measures):
        monkeypatch.setattr(regimes, "measure", measures)
        monkeypatch.setattr(ncu, "find_ncu", lambda: "ncu")
        monkeypatch.setattr(ncu, "measure", measures)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(on_gpu, "run", measures)
        monkeypatch.setattr(record, "device_name", lambda device: "ACME GPU")
        monkeypatch.setattr(record, "version", lambda package: "1")
        shape = ("--device", "cpu", "--case", "17,5")
        return ((regimes.main, shape), (ncu.main, ()), (on_gpu.main, ("--step", "small")))

    def test_before_anything_is_measured(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        for command, arguments in self.commands(monkeypatch, lambda *_: pytest.fail("measured")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda command=command: command is on_gpu.main)
            result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "file" / "below")])
            assert result.exit_code == 2 and "cannot write to" in result.output

    def test_after(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        rows = {"step": "small", "device_us": None, "clock_us": 1.0, "iterations": 1}
        for command, arguments in self.commands(monkeypatch, lambda *_: rows):
            monkeypatch.setattr(ncu, "measure", lambda *_: [])
            monkeypatch.setattr(torch.cuda, "is_available", lambda command=command: command is on_gpu.main)
            monkeypatch.setattr("pathlib.Path.replace", full)
            result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path)])
            assert result.exit_code == 2 and "No space left on device" in result.output, result.exception


class TestNcu:
    """Its output, as ncu prints it, and what is made of it."""

    NAMES = ("ID", "Kernel Name", "Block Size", "Grid Size", *ncu.SHARES.values(), ncu.SECONDS)
    COUNTS = (*(ncu.OPERATION.format(name) for name in ncu.OPERATIONS), ncu.OPERATION_CLOCK, ncu.FFMA_PEAK)
    CLOCKS = (ncu.FFMA_CLOCK, ncu.DRAM_RATE, ncu.DRAM_PEAK, ncu.DRAM_CLOCK)

    def output(self, *rows):
        names = (*self.NAMES, *self.COUNTS, *self.CLOCKS)
        units = [""] * 4 + ["%"] * len(ncu.SHARES) + ["nsecond"] + ["x"] * (len(names) - 5 - len(ncu.SHARES))
        lines = [",".join(f'"{value}"' for value in line) for line in (names, units, *rows)]
        return "\n".join(["==PROF== Connected to process 7", *lines, "==PROF== Disconnected"])

    def row(self, kernel, nanoseconds, share="50.0"):
        counts = ("10", "20", "1,000", "2e9", "4096", "2e9", "3e12", "2048", "2.6e9")
        return ("0", kernel, "(256, 1, 1)", "(132, 1, 1)", *[share] * len(ncu.SHARES), nanoseconds, *counts)

    def test_reads_one_row_a_kernel_the_longest(self):
        rows = ncu.read(self.output(self.row("f", "1,500"), self.row("g", "7"), self.row("f", "2,500", "n/a")))
        longest, other = rows
        assert (longest["kernel"], longest["launches"], longest["seconds"]) == ("f", 2, pytest.approx(2.5e-6))
        assert longest["memory_share"] is None and other["memory_share"] == 0.5
        assert other["float32_flops"] == pytest.approx((10 + 20 + 2 * 1000) * 2e9)
        assert other["float32_peak"] == pytest.approx(2 * 4096 * 2e9)
        assert (other["dram_bytes"], other["dram_peak"]) == (3e12, pytest.approx(2048 * 2.6e9))

    def test_output_without_a_table(self):
        with pytest.raises(ValueError, match="no table"):
            ncu.read("==ERROR== ERR_NVGPUCTRPERM\n")

    def fake(self, tmp_path, text, code=0):
        """An ncu that prints this."""
        tool = tmp_path / "ncu"
        tool.write_text(
            f"#!{sys.executable}\nimport sys\nassert '--csv' in sys.argv\nprint({text!r})\nsys.exit({code})\n"
        )
        tool.chmod(0o755)
        return str(tool)

    def test_the_command(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ncu, "find_ncu", lambda: self.fake(tmp_path, self.output(self.row("solve_grid", "9000"))))
        monkeypatch.setattr(ncu, "environment", lambda device: {"device": "ACME GPU"})
        monkeypatch.setattr(record, "device_name", lambda device: "ACME GPU")
        result = CliRunner().invoke(ncu.main, ["--out", str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 0 and re.search(r"9.0 us  solve_grid .* memory 50 %", result.output)
        (row,) = json.loads((tmp_path / "acme-gpu" / "ncu.json").read_text())
        assert row["device"] == "ACME GPU" and row["kernel"] == "solve_grid" and row["compute_share"] == 0.5
        monkeypatch.setattr(ncu, "find_ncu", lambda: self.fake(tmp_path, "==ERROR== ERR_NVGPUCTRPERM", 1))
        result = CliRunner().invoke(ncu.main, ["--out", str(tmp_path)])
        assert result.exit_code == 1 and "ended with code 1" in result.output and "NVGPUCTRPERM" in result.output
        monkeypatch.setattr(ncu, "find_ncu", lambda: None)
        result = CliRunner().invoke(ncu.main, [])
        assert result.exit_code == 1 and "ncu (NVIDIA Nsight Compute) is neither on the path" in result.output


class TestOnGpu:
    """The one command for a machine with a GPU: its steps as data, and how they are run."""

    def test_steps(self):
        steps = {step.name: step for step in on_gpu.plan((9, 0), Path("/out"))}
        assert tuple(steps) == on_gpu.NAMES
        assert steps["build"].command[-1] == "cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real"
        assert on_gpu.plan((8, 0), Path("/out"))[0].command[-1] == "cmake.define.CMAKE_CUDA_ARCHITECTURES=80-real"
        before_bench = sum(step.limit for step in on_gpu.plan((9, 0), Path("/out"))[: on_gpu.NAMES.index("bench")])
        assert before_bench <= 8 * 60  # even if all of them take as long as they may
        for name in ("constants", "bench"):  # the commands exist and know these options
            _, _, module, *arguments = steps[name].command
            assert module == "deq.cli" and arguments[0] == "bench"
            options = bench.commands[arguments[1]].params
            assert {a for a in arguments if a.startswith("--")} <= {o for p in options for o in p.opts}
        for step in steps.values():
            for part in step.command:
                if part.startswith("tests/"):
                    assert (on_gpu.ROOT / part).exists()

    def run(self, *code, seconds=30.0, limit=30.0):
        steps = [on_gpu.Step(f"step {i}", limit, (sys.executable, "-c", c)) for i, c in enumerate(code)]
        return on_gpu.run_all(steps, seconds, lambda records: None)

    def test_runs_all_and_keeps_what_they_say(self, capfd):
        first, second, third = self.run("print('good')", "import sys; print('bad'); sys.exit(3)", "print('{left}')")
        assert (first["code"], first["output"]) == (0, "good\n")
        assert (second["code"], second["output"]) == (3, "bad\n")
        assert third["code"] == 0 and 20 < int(third["output"]) < 30  # the seconds that it has
        assert "good" in capfd.readouterr().out
        assert on_gpu.verdict(second).split() == ["step", "1", "0", "s", "failed", "(3)"]

    @pytest.mark.parametrize("how", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
    def test_a_step_that_takes_too_long_is_interrupted_and_the_next_one_runs(self, monkeypatch, how):
        monkeypatch.setattr(on_gpu, "LEAST", 0.1)
        before = signal.signal(signal.SIGINT, how)
        wait = "try:\n  print('begun', flush=True)\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('kept')"
        slow = f"import time\n{wait}"
        try:
            first, second = self.run(slow, slow, limit=1.5)
        finally:
            signal.signal(signal.SIGINT, before)
        for step in (first, second):
            assert step["code"] is None and step["output"] == "begun\nkept\n" and 1 < step["seconds"] < 12
            assert "out of time" in on_gpu.verdict(step)

    def test_no_step_begins_without_time(self):
        (record,) = self.run("print(1)", seconds=1.0)
        assert record["code"] is None and record["output"] == "not begun: no time was left"

    def test_a_missing_tool_is_named(self):
        record = on_gpu.run(on_gpu.Step("x", 9, ("no-such-tool",)), 9)
        assert record["code"] != 0 and record["output"] == "no-such-tool: No such file or directory"

    def test_the_file_keeps_other_steps_of_the_commit(self, tmp_path):
        path = tmp_path / "on_gpu.json"
        on_gpu.write(path, [{"step": "tests", "code": 1}, {"step": "build", "code": 0}], {"commit": "a"})
        on_gpu.write(path, [{"step": "tests", "code": 0}], {"commit": "a"})
        rows = json.loads(path.read_text())
        assert [(row["step"], row["code"]) for row in rows] == [("build", 0), ("tests", 0)]
        on_gpu.write(path, [{"step": "bench", "code": 0}], {"commit": "b"})
        assert [row["step"] for row in json.loads(path.read_text())] == ["bench"]

    def test_the_command(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(record, "device_name", lambda device: "ACME GPU")
        code = "import sys; sys.exit({})"
        steps = [on_gpu.Step(name, 30, (sys.executable, "-c", code.format(i))) for i, name in enumerate(on_gpu.NAMES)]
        monkeypatch.setattr(on_gpu, "plan", lambda capability, out: steps)
        arguments = ["--step", "build", "--step", "small", "--out", str(tmp_path)]
        result = CliRunner().invoke(on_gpu.main, arguments, catch_exceptions=False)
        assert result.exit_code == 1 and re.search(r"build .* passed\nsmall .* failed \(1\)", result.output)
        rows = json.loads((tmp_path / "acme-gpu" / "on_gpu.json").read_text())
        assert [(row["step"], row["device"]) for row in rows] == [("build", "ACME GPU"), ("small", "ACME GPU")]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
    def test_without_a_gpu(self):
        result = CliRunner().invoke(on_gpu.main, [])
        assert result.exit_code == 1 and "torch sees no CUDA GPU here" in result.output

    def test_small_cases(self, monkeypatch):
        monkeypatch.setattr(small_cases, "SHAPES", ((1, 1), (17, 5)))
        assert small_cases.check("cpu", "reference") == len(small_cases.SHAPES) * (len(small_cases.SOLVERS) + 1)
        with pytest.raises(SystemExit, match="no backend for meta tensors"):
            small_cases.main("meta")
