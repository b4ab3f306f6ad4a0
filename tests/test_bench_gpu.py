"""The benchmark for GPUs, run from end to end on the CPU, where its loops are not captured."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from deq import gpu_device
from deq.bench import cli, constants, figure, goals, gpu, graphed, report
from deq.bench.baselines import torch_loop
from deq.bench.cases import GPU_CASES, TOL, Case
from deq.bench.cli import bench
from deq.bench.constants import Sizes
from deq.bench.device import capture, clock, device_seconds
from deq.bench.gpu import Ceilings, GpuRun
from deq.bench.quality import relative_error, worst_error
from deq.bench.run import Selection
from deq.gpu_device import find_device

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
        nothing_left = self.run(tmp_path, resume=True)
        assert len(nothing_left) == 1 and nothing_left.results.goals == again.results.goals != []

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

    @pytest.mark.parametrize(
        ("full", "processors", "name", "stand_in"),
        [
            ("NVIDIA H200", 132, "H200", ""),
            ("NVIDIA H100 80GB HBM3", 132, "H100", ""),
            ("NVIDIA H100 PCIe", 114, "H100 PCIe", "H100"),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16, "H100 80GB HBM3 MIG 1g.10gb", "H100"),
            ("NVIDIA GH200-480GB", 132, "GH200 480GB", "H100"),
        ],
    )
    def test_a_card_of_another_size_has_an_entry_of_its_own(self, monkeypatch, full, processors, name, stand_in):
        """By its name alone it would have replaced that of its larger namesake."""
        monkeypatch.setattr(constants, "device_name", lambda kind: full)
        monkeypatch.setattr(constants, "of_driver", lambda device: {"processors": processors})
        measuring = constants.Measuring(Sizes(torch.device("cuda")), (9, 0))
        assert measuring.name == name
        sources = {number["source"] for number in measuring.numbers.values()}
        assert (f"that of the {stand_in}" in sources) == bool(stand_in)
        monkeypatch.setattr(gpu_device, "table", lambda: {"H100": {}, "H200": {}, measuring.name: {}})
        assert gpu_device.key_of(full) == name  # where plans look for it

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
