"""The harness: baselines solve the problem, statistics are what they say, files hold what they should."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import deq_command
from rich.console import Console

from deq import _library, reference
from deq.bench import baselines, memory, peers, record, report, seeds, steep
from deq.bench.cases import AUTO_CASES, CPU_CASES, KERNEL_CASES, MEMORY_CASE, TOL, Case
from deq.bench.cli import bench
from deq.bench.cpu import measure, measure_kernel
from deq.bench.quality import relative_error, worst_error
from deq.bench.timing import MIN_TURNS, Timing, interleave
from deq.files import replace_text
from deq.profiling.memory import can_measure, peak_of

SMALL = Case(17, 5)
needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
needs_proc = pytest.mark.skipif(not can_measure(), reason="peak memory is read from Linux's /proc")


def render(table) -> str:
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


class TestCases:
    @pytest.mark.parametrize("cases", [CPU_CASES, AUTO_CASES])
    def test_names_are_unique(self, cases):
        assert len({case.name for case in cases}) == len(cases)

    def test_required_ratios_belong_to_the_first_issue(self):
        required = {(case.m, case.B): tuple(case.must.values()) for case in CPU_CASES if case.must}
        assert required == {
            (64, 256): (2.0, 10.0, 0.9),
            (256, 256): (1.4, 2.5, 1.1),
            (512, 64): (1.4, 2.0, 1.2),
            (2048, 16): (2.0, 2.0, 1.8),
        }
        assert (MEMORY_CASE.m, MEMORY_CASE.B) == (256, 16384)
        assert all(m >= 64 and B >= 8 for m, B in KERNEL_CASES)

    @pytest.mark.parametrize("family", ["gaussian", "orthogonal"])
    def test_a_case_is_the_same_every_time_and_its_weight_as_described(self, family):
        case = Case(200, 3, family)
        problem, again = case.make(), case.make()
        assert all(torch.equal(getattr(problem, name), getattr(again, name)) for name in ("W", "c", "g"))
        assert not torch.equal(Case(200, 3, family, seed=1).make().W, problem.W)
        norm = torch.linalg.matrix_norm(problem.W, 2)
        assert 0.85 < norm < 0.95 if family == "gaussian" else abs(norm - 0.9) < 1e-5

    def test_exact_solution(self):
        problem = Case(6, 4, dtype="float64").make()
        z, dW = problem.exact()
        torch.testing.assert_close(torch.relu(z @ problem.W.mT + problem.c), z, rtol=1e-12, atol=1e-12)
        D = torch.diag_embed((z > 0).double())
        J = torch.eye(6, dtype=torch.float64) - D @ problem.W
        u = torch.linalg.solve(J.mT, problem.g.unsqueeze(-1))
        torch.testing.assert_close(((D @ u).squeeze(-1)).mT @ z, dW)


class TestBaselines:
    @pytest.mark.parametrize("case", [SMALL, Case(64, 9), Case(33, 4, "orthogonal", "float64")], ids=lambda c: c.name)
    @pytest.mark.parametrize("name", ["engine", "torch_loop", *baselines.TORCHDEQ_SOLVERS])
    def test_solve_the_problem(self, case, name):
        if name in baselines.TORCHDEQ_SOLVERS:
            pytest.importorskip("torchdeq")
            run = baselines.make_torchdeq(name)
        else:
            run = getattr(baselines, name)
        problem = case.make()
        z, dW = problem.exact()
        answer, forward_only = run(problem), run(problem, backward=False)
        # A residual of tol is an error of at most tol / (1 - contraction); 20 allows for a contraction of 0.95.
        assert worst_error(answer.z, z) <= 20 * TOL
        assert relative_error(answer.dW, dW) <= 20 * TOL
        assert worst_error(forward_only.z, z) <= 20 * TOL
        assert forward_only.dW is None
        assert not answer.z.requires_grad
        assert 2 <= answer.iterations <= baselines.MAX_ITER

    def test_loop_stops_at_the_first_evaluation_that_satisfies_every_sample(self):
        for case in (SMALL, Case(64, 9), Case(33, 4, "orthogonal")):
            problem = case.make()
            z, evaluations, residual = torch.zeros_like(problem.c), 0, torch.tensor(1.0)
            while residual.max() > TOL:
                new = reference.cell(problem.W, problem.c, z, "relu")
                residual = (new - z).norm(dim=1) / new.norm(dim=1)
                z, evaluations = new, evaluations + 1
            assert baselines.torch_loop(problem).iterations == evaluations

    def test_loop_ends_for_a_sample_without_any_active_unit(self):
        problem = SMALL.make()
        problem.c[0] = -1e6
        answer = baselines.torch_loop(problem)
        assert answer.iterations < 50
        assert torch.equal(answer.z[0], torch.zeros(17))

    def test_gemm_only_makes_the_products_of_the_loop_and_nothing_else(self):
        problem = SMALL.make()
        run = baselines.make_gemm_only(problem, 7, 5)
        with torch.profiler.profile(acc_events=True) as profile:
            run()
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts.pop("aten::mm") == 7 + 5 + 1
        assert set(counts) <= {"aten::resolve_conj"}  # part of mm


class TestTiming:
    def test_statistics(self):
        timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0), 0.5)
        assert timing.median == 3.0
        assert timing.percentile(20) == pytest.approx(1.8)
        assert timing.percentile(80) == pytest.approx(23.2)

    def test_ratio_is_paired_by_turn(self):
        """Both slow down tenfold in the same turns: the ratio of medians would be off, that of the turns is not."""
        other = Timing((1.0, 10.0, 1.0, 10.0, 1.0), 1.0)
        assert Timing((2.0, 20.0, 2.0, 20.0, 20.0), 2.0).ratio(other) == 2.0

    def test_turns_rotate_and_prepare_comes_before_every_call(self, monkeypatch):
        monkeypatch.setattr("deq.bench.timing.TURN_SECONDS", 0.0)
        log = []
        clock = iter(range(10**6))
        timings = interleave(
            {"a": lambda: log.append("a"), "b": lambda: log.append("b")},
            1e-9,
            prepare=lambda: log.append("-"),
            clock=lambda: next(clock),
        )
        assert [len(timing.turns) for timing in timings.values()] == [MIN_TURNS, MIN_TURNS]
        calls = "".join(log)
        assert calls.startswith("-a-a-a-b-b-b" + "-a-b" + "-b-a" + "-a-b")
        assert len(calls) == 2 * (6 + 2 * MIN_TURNS)
        assert timings["a"].median == timings["a"].best == 1.0

    def test_finds_a_known_ratio(self):
        timings = interleave({"one": lambda: time.sleep(2e-3), "three": lambda: time.sleep(6e-3)}, 0.1)
        assert timings["three"].ratio(timings["one"]) == pytest.approx(3.0, rel=0.25)

    def test_best_is_the_shortest_call_of_all_turns(self):
        ticks = iter([0.0, 5.0] * 3 + [0.0, 4.0] + [0.0, 2.0] + [0.0, 3.0] * 100)
        timings = interleave({"a": lambda: None}, 1e-9, clock=lambda: next(ticks), min_turns=3)
        assert timings["a"].turns == (4.0, 2.0, 3.0)
        assert timings["a"].best == 2.0

    def test_long_calls_warm_up_but_once(self, monkeypatch):
        monkeypatch.setattr("deq.bench.timing.WARM_UP_SECONDS", 0.0)
        calls = []
        interleave({"long": lambda: (calls.append(0), time.sleep(3e-3))}, 1e-9, min_turns=2)
        assert len(calls) == 1 + 2

    def test_short_calls_share_a_turn(self):
        calls = []
        timings = interleave({"short": lambda: calls.append(0)}, 1e-9)
        assert len(timings["short"].turns) == MIN_TURNS
        assert len(calls) > 10 * MIN_TURNS


@needs_library
class TestMeasure:
    def test_rows(self):
        before = torch.get_num_threads()
        rows = measure(Case(17, 5, must={"loop": 0.001, "gemm": 1e6}), threads=1, seconds=0.05)
        assert torch.get_num_threads() == before
        by_name = {row["baseline"]: row for row in rows}
        assert set(by_name) >= {"deq", "loop", "gemm"}
        assert by_name["deq"]["ratio"] == 1.0
        assert by_name["loop"]["reached"] is True
        assert by_name["gemm"]["reached"] is False
        assert by_name["deq"]["reached"] is None
        assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in rows)
        assert all(row["error"] < 1e-4 for row in rows if row["baseline"] != "gemm")
        assert all(row["gradient_error"] < 1e-4 for row in rows if row["baseline"] != "gemm")
        assert all(row["flops"] > 0 and row["bytes"] > 0 for row in rows)
        assert by_name["gemm"]["error"] is None
        assert by_name["gemm"]["iterations"] == by_name["loop"]["iterations"]

    def test_kernel(self):
        (row,) = measure_kernel([(64, 8)], seconds=0.02)
        assert row["gflops"] > 0
        assert row["ratio"] == row["gflops"] / row["peak"]
        assert row["reached"] == (row["ratio"] >= 0.9)


@needs_proc
class TestMemory:
    @pytest.mark.parametrize("megabytes", [40, 100])  # above 32 MB glibc always returns what is freed
    def test_peak_of_a_known_allocation(self, megabytes):
        def run():
            for _ in range(3):  # not their sum: each is freed before the next
                torch.ones(megabytes * 2**18)

        peak = peak_of(run) / 2**20
        assert megabytes - 1 < peak < megabytes + 8


class TestReport:
    ROWS = (
        {"baseline": "deq", "ratio": 1.0, "must": None, "reached": None, "iterations": 14, "error": 2e-6},
        {"baseline": "loop", "ratio": 2.5, "must": 2.0, "reached": True, "iterations": 14, "error": 3e-6},
        {"baseline": "torchdeq", "ratio": 123.45, "must": 10.0, "reached": True, "iterations": 14, "error": 3e-6},
        {"baseline": "gemm", "ratio": 0.85, "must": 0.9, "reached": False, "iterations": 14, "error": None},
    )

    def rows(self):
        common = {"case": "orthogonal-m2048-B16384-float64", "threads": 2, "median": 1.2345}
        return [common | {"variant": row["baseline"]} | row for row in self.ROWS]

    def test_times_fit_80_columns(self):
        text = render(report.times(self.rows()))
        assert "…" not in text
        line = next(line for line in text.splitlines() if line.startswith("2048od"))
        assert (
            re.sub(" +", " ", line.strip()) == "2048od 16384 2 1.23e+03 2.50 (2) 123.45 (10) 0.85 (0.9)! 14 2e-06 3e-06"
        )

    def test_competitor_that_is_not_installed(self):
        text = render(report.times([row for row in self.rows() if row["baseline"] != "torchdeq"]))
        assert re.search(r"2.50 \(2\) +- +0.85 \(0.9\)!", text)

    def test_kernels_and_memory(self):
        row = {"case": "kernel-m64-B8-float32", "gflops": 100.0, "peak": 125.0, "ratio": 0.8, "must": 0.9}
        assert re.search(r"64 +8 +100.0 +125.0 +0.80 \(0.9\)!", render(report.kernels([row | {"reached": False}])))
        row = {"case": "gaussian-m256-B64-float32", "variant": "deq", "buffers": 1.0, "must": 1.2, "reached": True}
        rows = [row | {"pass": "forward"}, row | {"pass": "forward + backward", "buffers": 2.0, "must": 2.5}]
        text = render(report.memory(rows))
        assert re.search(r"deq +1.00 \(1.2\) +2.00 \(2.5\)", text)
        assert "m = 256, B = 64" in text

    def test_summary(self):
        assert report.summary(self.rows()) == (
            "2 of 3 required figures reached; not: gemm at orthogonal-m2048-B16384-float64."
        )
        assert report.summary(self.rows()[:3]) == "2 of 2 required figures reached."


class TestCommand:
    @needs_library
    def test_cpu(self, tmp_path):
        arguments = ["cpu", "--case", "17,5", "--threads", "1", "--seconds", "0.02", "--out", str(tmp_path)]
        arguments += ["--pass", "training"]
        result = CliRunner().invoke(bench, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert re.search(r"^ *17 +5 +1 ", result.output, re.MULTILINE)
        (path,) = tmp_path.glob("*/cpu.json")
        rows = json.loads(path.read_text())
        assert [row["baseline"] for row in rows][:2] == ["deq", "loop"]
        needed = {"case", "variant", "median", "p20", "p80", "ratio", "iterations", "error", "threads"}
        plain = [row for row in rows if "pass" not in row]
        assert len(plain) >= 3
        assert all(needed | {"commit", "versions", "device"} <= set(row) for row in plain)
        assert rows[0]["versions"]["torch"] == torch.__version__

    @needs_library
    @needs_proc
    def test_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "has_torchdeq", lambda: False)  # saves the time of its imports
        result = CliRunner().invoke(bench, ["memory", "--case", "64,16384", "--out", str(tmp_path)])
        assert result.exit_code == 0
        (path,) = tmp_path.glob("*/memory.json")
        buffers = {(row["variant"], row["pass"]): row["buffers"] for row in json.loads(path.read_text())}
        assert set(buffers) == {(name, which) for name in memory.competitors() for which in memory.PASSES}
        for name in memory.competitors():
            # The result alone is one buffer, two with the gradient of c; 4 MB buffers leave a quarter of one for noise.
            assert buffers[name, "forward"] > 0.75
            assert buffers[name, "forward + backward"] > 1.75
        assert buffers["deq", "forward"] < buffers["loop", "forward"]

    @pytest.mark.parametrize("value", ["64", "64x2", "a,b", "0,4", "1,2,3", "²,3", f"{10**20},1"])
    def test_bad_case(self, value):
        result = CliRunner().invoke(bench, ["cpu", "--case", value])
        assert result.exit_code == 2
        assert f"{value!r} is not a width and a batch such as 256,64" in result.output

    @needs_library
    @needs_proc
    def test_a_process_without_memory_says_so(self, tmp_path):
        result = CliRunner().invoke(bench, ["memory", "--case", f"{2**22},1", "--out", str(tmp_path)])
        assert result.exit_code == 1 and f"Error: deq, forward, at gaussian-m{2**22}-B1-float32: " in result.output
        assert "memory" in result.output

    @needs_library
    @needs_proc
    @pytest.mark.parametrize("ends, code", [(KeyboardInterrupt(), 130), (RuntimeError("no memory"), 1)])
    def test_what_was_measured_before_an_end_is_kept(self, ends, code, tmp_path, monkeypatch):
        peaks = iter((4 * 17 * 5, 8 * 17 * 5, 4 * 17 * 5))

        def peak(*arguments) -> int:
            try:
                return next(peaks)
            except StopIteration:
                raise ends from None

        monkeypatch.setattr(memory, "_in_fresh_process", peak)
        result = deq_command("bench", "memory", "--case", "17,5", "--out", tmp_path)
        assert result.exit_code == code
        assert ("Interrupted: what was finished is kept." if code == 130 else "Error: no memory") in result.stderr
        assert re.search(r"deq auto +1.00 \(1.2\) +-", result.output)
        (path,) = tmp_path.glob("*/memory.json")
        assert [row["buffers"] for row in json.loads(path.read_text())] == [1, 2, 1]

    @needs_library
    @pytest.mark.parametrize("name", ["seeds", "steep", "peers"])
    def test_ctrl_c_keeps_what_was_measured(self, name, tmp_path, monkeypatch):
        if name == "peers":
            pytest.importorskip("torchdeq")
        module = {"seeds": seeds, "steep": steep, "peers": peers}[name]
        measure, calls = module.measure, []

        def once(*arguments) -> object:
            if calls:
                raise KeyboardInterrupt
            calls.append(arguments)
            return measure(*arguments)

        monkeypatch.setattr(module, "measure", once)
        options = {"seeds": (), "steep": ("--width", 8), "peers": ("--seconds", 0.01)}[name]
        result = deq_command("bench", name, "--threads", 1, "--threads", 2, *options, "--out", tmp_path)
        assert result.exit_code == 130 and "Interrupted: what was finished is kept." in result.stderr
        (path,) = tmp_path.glob(f"*/{name}.json")
        assert {row["threads"] for row in json.loads(path.read_text())} == {1}

    @pytest.mark.parametrize("command", ["cpu", "memory"])
    def test_without_the_library(self, command, monkeypatch):
        monkeypatch.setattr(_library, "compiled", None)
        monkeypatch.setattr(_library, "reason", "no compiler")
        result = CliRunner().invoke(bench, [command])
        assert result.exit_code == 1
        assert "without the compiled library: no compiler" in result.output


class TestRecord:
    def test_environment(self):
        where = record.environment()
        assert where["device"]
        assert where["versions"]["deq"]
        assert where["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", where["commit"])

    def test_a_name_without_a_model_gets_its_numbers(self):
        told = "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {}\n"
        assert record.cpu_name(told.format("ACME")) == "ACME, family 26, model 2"
        assert record.cpu_name(told.format("ACME 9005")) == "ACME 9005"
        assert record.cpu_name("model name\t: ACME\n") == "ACME" and record.cpu_name("") is None

    def test_write(self, tmp_path, monkeypatch):
        monkeypatch.setattr(record, "device_name", lambda device: "ACME(R) CPU  @ 3.0 GHz")
        path = record.write([{"a": 1}, {"b": None}], tmp_path, "cpu")
        assert path == tmp_path / "acme-r-cpu-3-0-ghz" / "cpu.json"
        assert json.loads(path.read_text()) == [{"a": 1}, {"b": None}]

    def test_an_interruption_while_writing_leaves_the_file_of_before(self, tmp_path, monkeypatch):
        path = record.write([{"a": 1}], tmp_path, "cpu")
        before = path.read_text()

        def stopped(self: Path, text: str, encoding: str) -> None:
            self.write_bytes(text[:5].encode())
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_text", stopped)
        with pytest.raises(KeyboardInterrupt):
            record.write([{"a": 2}], tmp_path, "cpu")
        assert path.read_text() == before
        assert list(path.parent.iterdir()) == [path]

    def test_two_processes_write_the_same_file(self, tmp_path, monkeypatch):
        """Neither takes away what the other has begun."""
        path, write = tmp_path / "a.json", Path.write_text

        def meanwhile(self: Path, text: str, encoding: str) -> None:
            write(self, text, encoding)
            if text == "ours":
                monkeypatch.setattr("os.getpid", lambda: 1)
                replace_text(path, "theirs")
                assert path.read_text() == "theirs"

        monkeypatch.setattr(Path, "write_text", meanwhile)
        replace_text(path, "ours")
        assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


class TestPeers:
    """Blocks of users, against torchdeq."""

    @pytest.mark.parametrize("method", peers.METHODS)
    @pytest.mark.parametrize("case", peers.CASES[::3], ids=lambda case: case.name)
    def test_all_solve_the_same_problem(self, case, method):
        pytest.importorskip("torchdeq")
        runs, counts = peers.competitors(case, method)
        assert set(runs) == {"deq", "deq.torchdeq", "torchdeq", "block"}
        exact = peers.METHODS[method][2]
        assert counts["forward"] > 3 and (counts["backward"] > 3 if exact else counts["backward"] == 0)
        z, gradients = peers.exact(case, exact)
        del runs["block"]  # so many evaluations and products, wherever they lead
        for run in runs.values():
            found, found_gradients = run()
            assert worst_error(found.detach().flatten(1), z.flatten(1)) < 2e-4
            for a, b in zip(found_gradients, gradients, strict=True):
                assert relative_error(a, b) < 2e-3

    def test_rows(self):
        pytest.importorskip("torchdeq")
        rows = peers.measure(peers.CASES[3], "anderson", 1, 0.01)
        by_name = {row["variant"]: row for row in rows}
        assert by_name["deq"]["ratio"] == by_name["torchdeq"]["lead"] == 1
        assert {name for name, row in by_name.items() if row["must"]} == set(peers.JUDGED)
        must = 2.0 if rows[0]["block_share"] < 0.5 else 1.0
        assert all(by_name[name]["must"] == must for name in peers.JUDGED)
        assert all(by_name[name]["reached"] == (by_name[name]["lead"] >= must) for name in peers.JUDGED)
        text = render(report.peers(rows))
        assert "attention-2x4x16" in text and "…" not in text
