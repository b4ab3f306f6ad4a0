"""The benchmark for GPUs, run from end to end on the CPU, where its loops are not captured."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from deq import gpu_device
from deq.bench import cli, constants, figure, goals, gpu, graphed, ncu, on_gpu, record, regimes, report, small_cases
from deq.bench.baselines import torch_loop
from deq.bench.cases import GPU_CASES, TOL, Case
from deq.bench.cli import bench
from deq.bench.constants import Sizes
from deq.bench.device import capture, clock, device_seconds
from deq.bench.gpu import Ceilings, GpuRun
from deq.bench.quality import relative_error, worst_error
from deq.bench.run import Selection
from deq.gpu_device import find_device
from deq.gpu_plan import choose

CPU = torch.device("cpu")
SMALL = Case(17, 5)


@pytest.fixture
def without_torchdeq(monkeypatch):
    monkeypatch.setattr(gpu, "has_torchdeq", lambda: False)  # saves the time of its imports


@pytest.fixture(scope="module", params=[SMALL, Case(40, 1, "orthogonal0.5")], ids=lambda case: case.name)
def solved(request):
    problem = request.param.make()
    return problem, *problem.exact()


class TestCases:
    def test_cover_the_sizes_that_were_asked_for(self):
        assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)
        assert {64, 8192} <= {case.m for case in GPU_CASES} and {1, 4096} <= {case.B for case in GPU_CASES}
        for goal in goals.GPU_GOALS:
            assert any(goal.holds_for(case) for case in GPU_CASES), goal.name
        (m, B), _ = goals.GPU_SHARE
        assert (m, B) in {(case.m, case.B) for case in GPU_CASES}

    def test_required_ratios(self):
        required = {
            (64, 256): (8, 40),
            (256, 4096): (8, 40),
            (300, 64): (8, None),
            (1024, 256): (2.5, 10),
            (1024, 4096): (2, 4),
            (2048, 32): (4, None),
            (4096, 8): (4, None),
            (4096, 4096): (1.5, 2),
            (8192, 1): (None, None),
        }
        for (m, B), ratios in required.items():
            for baseline, ratio in zip(("graphed", "torchdeq"), ratios, strict=True):
                assert goals.must(Case(m, B), baseline, "forward", goals.GPU_GOALS) == ratio
                training = goals.must(Case(m, B), baseline, "training", goals.GPU_GOALS)
                assert training == (None if ratio is None else pytest.approx(0.8 * ratio))

    @pytest.mark.parametrize("case", [Case(7, 3), Case(64, 1, "outlier0.95", "float64", new_weights=True)])
    def test_are_found_by_name(self, case):
        assert Case.named(case.name) == case


class TestGraphedLoop:
    @pytest.mark.parametrize("chunk", graphed.CHUNKS, ids=str)
    def test_solves_what_the_eager_loop_solves(self, solved, chunk):
        problem, z, dW = solved
        eager, answer = torch_loop(problem), graphed.make_graphed_loop(problem, chunk=chunk)()
        eps = torch.finfo(torch.float32).eps
        assert worst_error(answer.z, z) <= 2 * worst_error(eager.z, z) + 2 * eps
        assert relative_error(answer.dW, dW) <= 2 * relative_error(eager.dW, dW) + 2 * eps
        # The residual is looked at every so often, and the counts agree up to that.
        assert answer.iterations == -(-eager.iterations // chunk.every) * chunk.every
        forward_only = graphed.make_graphed_loop(problem, backward=False, chunk=chunk)()
        assert torch.equal(forward_only.z, answer.z) and forward_only.dW is None

    def test_solves_anew_every_time_for_the_weight_as_it_is(self):
        problem = SMALL.make()
        run = graphed.make_graphed_loop(problem)
        first = run()
        assert torch.equal(run().z, first.z) and run().iterations == first.iterations
        problem.W.mul_(0.5)
        z, _ = problem.exact()
        assert worst_error(run().z, z) < 10 * TOL < worst_error(first.z, z)

    def test_gives_up(self, monkeypatch):
        monkeypatch.setattr(graphed, "MAX_ITER", 40)
        problem = Case(20, 3, "monotone0.1").make()
        answer = graphed.make_graphed_loop(problem, backward=False)()
        assert answer.iterations == 40

    @pytest.mark.parametrize("chunk", graphed.CHUNKS, ids=str)
    def test_makes_at_most_the_chunk_more_that_it_is_late(self, chunk):
        calls = []
        loop = graphed.Loop(lambda y, out: calls.append(out.copy_(y * 0.5 + 1)), torch.zeros(1, 3), 1e-2, chunk)
        loop.run()
        chunks = -(-int(loop.count) // chunk.length) + chunk.late
        assert len(calls) == chunks * chunk.length
        torch.testing.assert_close(loop.y, torch.full((1, 3), 2.0), rtol=1e-2, atol=0)


class TestDevice:
    def test_on_the_cpu_everything_is_the_plain_thing(self):
        calls = []
        run = capture(lambda: calls.append(0), CPU)
        run()
        assert len(calls) == 1
        assert device_seconds(run, CPU, 5) > 0 and len(calls) == 6
        read = clock(CPU)
        before = read()
        assert read() >= before


class TestMeasure:
    LIMITS = Ceilings(copy=1e10, product=1e11)

    def test_rows(self, without_torchdeq):
        before = torch.get_num_threads()
        forward, training = gpu.measure(SMALL, goals.PASSES, CPU, 0.02, self.LIMITS, find_device("H200"))
        assert torch.get_num_threads() == before
        for rows in (forward, training):
            by_name = {row["baseline"]: row for row in rows}
            assert list(by_name) == ["deq", "graphed", "loop", "torchdeq", "gemm"]
            assert by_name["torchdeq"]["why"] == "not installed" and by_name["torchdeq"]["ratio"] is None
            for name in ("deq", "graphed", "loop"):
                row = by_name[name]
                assert row["median"] > 0 and row["failed"] == 0 and row["error"] < 10 * TOL
                assert (row["gradient_error"] is None) == (rows is forward)
            assert by_name["deq"]["ratio"] == 1.0
            assert by_name["graphed"]["variant"] in by_name["graphed"]["attempts"]
            assert set(by_name["graphed"]["attempts"]) == {f"graphed loop, {chunk}" for chunk in graphed.CHUNKS}
        deq = forward[0]
        seconds = deq["device_median"]
        assert deq["flop_share"] == pytest.approx(2 * 17 * 17 * 5 * deq["mean_iterations"] / 1e11 / seconds)
        assert deq["byte_share"] == pytest.approx(4 * (17 * 17 + 2 * 5 * 17) / 1e10 / seconds)
        assert deq["roofline_share"] == max(deq["flop_share"], deq["byte_share"])
        assert forward[1]["device_ratio"] == forward[1]["device_median"] / seconds
        assert training[0]["flop_share"] is None and training[0]["expected_us"] is None
        assert deq["iteration_us"] == pytest.approx(1e6 * deq["median"] / deq["mean_iterations"])
        expected = [row["expected_us"] for row in forward]
        assert expected[0] < 3 and 5 < expected[1] < 6 and expected[2] == pytest.approx(71.56) and expected[3] is None

    def test_torchdeq(self):
        pytest.importorskip("torchdeq")
        problem = SMALL.make()
        rivals = gpu.find_rivals(SMALL, gpu.Truth(problem, *problem.exact()), False)
        assert rivals["torchdeq"].label.startswith("torchdeq ") and rivals["torchdeq"].why is None

    def test_a_rival_without_enough_memory_says_so(self, without_torchdeq, monkeypatch):
        def too_large(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(gpu, "torch_loop", too_large)
        problem = SMALL.make()
        rivals = gpu.find_rivals(SMALL, gpu.Truth(problem, *problem.exact()), False)
        assert rivals["loop"].why == "out of memory"
        assert rivals["gemm"].why == "has the loop's count, which out of memory"
        assert rivals["graphed"].why is None


class TestRun:
    SELECTION = Selection(((17, 5), (9, 2)), (), ("forward",), (1,), 0.01)

    def run(self, out, **options):
        return GpuRun(self.SELECTION, out, "cpu", sizes=Sizes.small(), **options)

    def test_measures_draws_and_reports(self, tmp_path, without_torchdeq):
        run = self.run(tmp_path)
        steps = list(run.steps())
        assert len(steps) == 3
        assert steps[1:] == [f"{case.name}, forward" for case in run.cases]
        rows = json.loads(run.path.read_text())
        assert {row["case"] for row in rows if "baseline" in row} == {
            "gaussian-m17-B5-float32",
            "gaussian-m9-B2-float32",
        }
        assert all({"commit", "versions", "device", "copy_ceiling"} <= set(row) for row in rows if "baseline" in row)
        assert [row["variant"] for row in rows if "baseline" not in row] == ["samples not solved"]
        figure.draw(run.results.auto, tmp_path / "gpu.png")
        assert (tmp_path / "gpu.png").stat().st_size > 10_000

    def test_resumes(self, tmp_path, without_torchdeq):
        run = self.run(tmp_path)
        steps = run.steps()
        while len(run.results.auto) == 0:
            next(steps)
        steps.close()  # Ctrl-C in the middle
        first = json.loads(run.path.read_text())
        again = self.run(tmp_path, resume=True)
        assert len(again) == 2
        assert [step.split(",")[0] for step in again.steps()][1:] == [run.cases[1].name]
        rows = json.loads(run.path.read_text())
        assert [row for row in rows if "baseline" in row][:5] == [row for row in first if "baseline" in row]

    def test_ends_in_time(self, tmp_path, without_torchdeq):
        run = self.run(tmp_path, budget=0.0)
        assert len(list(run.steps())) == 1 and run.skipped == run.cases
        assert run.results.auto == []

    def test_shares_are_judged(self):
        row = {"baseline": "deq", "pass": "forward", "threads": 1, "case": Case(4096, 4096).name, "flop_share": 0.7}
        (verdict,) = goals.judge_share([row, row | {"case": SMALL.name}, row | {"pass": "training"}])
        assert (verdict["value"], verdict["must"], verdict["reached"]) == (0.7, 0.75, False)


class TestReport:
    def test_fits_80_columns(self):
        from rich.console import Console

        common = {"case": Case(4096, 4096).name, "pass": "forward", "threads": 1, "must": None, "reached": None}
        common |= {"error": 2e-6, "mean_iterations": 14.0, "failed": 0.0, "device_median": 4.2e-3, "device_ratio": 1.0}
        rows = [common | {"baseline": "deq", "ratio": 1.0, "median": 4.3e-3, "roofline_share": 0.78}]
        for name, ratio in (("graphed", 11.2), ("loop", 57.3), ("compiled", 23.4), ("torchdeq", 171.5)):
            rows.append(common | {"baseline": name, "ratio": ratio, "must": 12, "reached": ratio > 12})
        console = Console(width=80, no_color=True)
        with console.capture() as captured:
            console.print(report.gpu(rows))
        text = captured.get()
        assert "…" not in text
        line = next(line for line in text.splitlines() if line.startswith("4096x4096"))
        assert re.sub(" +", " ", line.strip()) == "4096x4096 4300 4200 11.2! 1.0 57.3 23.4 171.5 14 2e-06 2e-06 78"


class TestConstants:
    def test_every_measurement_belongs_to_the_table(self):
        numbers = gpu_device.table()["H200"]["numbers"]
        assert set(constants.MEASUREMENTS) <= set(numbers)

    def test_all_are_measured_or_say_why_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(constants._library, "compiled", None)  # no driver is asked here
        measuring = constants.Measuring(Sizes.small(), (9, 0))
        assert list(measuring.steps()) == list(constants.MEASUREMENTS)
        for name in constants.MEASUREMENTS:
            number = measuring.numbers[name]
            assert (number["basis"] == "measured") != (name in measuring.failed)
            assert number["value"] > 0
        by_cuda = {"grid_barrier", "cluster_barrier", "mma_share", "shared_bytes_per_clock"}
        assert by_cuda <= set(measuring.failed) <= by_cuda | {"matmul_float8"}
        for name in by_cuda:
            assert measuring.numbers[name]["basis"] == "estimated"
            assert measuring.numbers[name]["source"] == "that of the H100"
        path = tmp_path / "table.json"
        monkeypatch.setattr(gpu_device, "PATH", path)
        rows = json.loads(measuring.write(tmp_path, update=True).read_text())
        assert {row["constant"] for row in rows} == set(measuring.numbers)
        updated = json.loads(path.read_text())
        assert set(updated) == {*gpu_device.table(), measuring.name}
        assert updated["H200"] == gpu_device.table()["H200"]
        assert updated[measuring.name]["numbers"]["item"]["basis"] == "measured"

    def test_known_rates_are_found(self):
        """A copy and a product take what they take: the same as by hand, within what a busy machine adds."""
        sizes = Sizes(CPU, copy=2**24, product=256, calls=3)
        assert 1e8 < constants.copy_rate(sizes) < 1e12
        assert 1e8 < constants.float32_rate(sizes) < 1e13

    def test_report(self):
        from rich.console import Console

        numbers = gpu_device.table()["A100"]["numbers"]
        console = Console(width=80, no_color=True)
        with console.capture() as captured:
            console.print(report.constants("A100", numbers, {"item": "no device"}))
        text = captured.get()
        assert re.search(r"copy +1.7e\+12 +B/s +estimated", text) and re.search(r"item .* failed: no device", text)
        assert re.search(r"cluster_barrier +none", text)


class TestCommands:
    """What lies behind the question for a GPU."""

    @pytest.fixture(autouse=True)
    def on_the_cpu(self, monkeypatch, without_torchdeq):
        monkeypatch.setattr(cli, "_need_gpu", lambda: None)
        monkeypatch.setattr(constants._library, "compiled", None)
        measuring, run = constants.Measuring, GpuRun
        monkeypatch.setattr(constants, "Measuring", lambda: measuring(Sizes.small(), (9, 0)))
        monkeypatch.setattr(
            gpu, "GpuRun", lambda chosen, out, device, *rest: run(chosen, out, "cpu", *rest, sizes=Sizes.small())
        )

    def test_gpu(self, tmp_path):
        arguments = ["gpu", "--case", "17,5", "--pass", "forward", "--seconds", "0.01", "--out", str(tmp_path)]
        result = CliRunner().invoke(bench, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert re.search(r"^17x5 ", result.output, re.MULTILINE) and "required figures reached" in result.output
        assert {path.name for path in tmp_path.glob("*/*")} == {"gpu.json", "gpu.png"}

    def test_gpu_refuses_what_it_cannot_make(self, tmp_path):
        arguments = ["gpu", "--case", "17,5", "--family", "trained7", "--out", str(tmp_path)]
        result = CliRunner().invoke(bench, arguments)
        assert result.exit_code == 2 and "trained" in result.output

    def test_constants(self, tmp_path):
        result = CliRunner().invoke(bench, ["constants", "--out", str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 0
        assert re.search(r"^grid_barrier .* failed: the compiled", result.output, re.MULTILINE)
        (path,) = tmp_path.glob("*/constants.json")
        assert len(json.loads(path.read_text())) == len(gpu_device.table()["H200"]["numbers"])
        assert "Regime B (W in a cluster of 16)" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
@pytest.mark.parametrize("command", ["gpu", "constants"])
def test_without_a_gpu(command):
    result = CliRunner().invoke(bench, [command])
    assert result.exit_code == 1
    assert re.search(
        "nothing to measure without a CUDA GPU: (this torch is a CPU build|torch sees no device)", result.output
    )


def test_whether_a_kernel_for_clusters_would_pay():
    numbers = gpu_device.table()["H200"]["numbers"]

    def verdict(cluster, grid, basis="measured"):
        barriers = {"cluster_barrier": cluster, "grid_barrier": grid}
        changed = {key: numbers[key] | {"value": value, "basis": basis} for key, value in barriers.items()}
        return constants.cluster_verdict("H200", numbers | changed)

    assert verdict(1e-6, 0.5e-6).endswith(": it would not pay.")
    assert "it would pay at m = 512, 768" in verdict(0.1e-6, 3e-6)
    assert "not decided, cluster_barrier and grid_barrier being estimated" in verdict(0.2e-6, 1.2e-6, "estimated")
    assert "has no clusters" in verdict(None, 1e-6)


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
