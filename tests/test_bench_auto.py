"""The benchmark of what deq chooses: problems are what they are called, rivals solve them, ratios are right."""

import json
import math
import re
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from rendered import render

from deq import _library
from deq.bench import baselines, families, figure, goals, jax_baselines, report, scaling, trained, versus
from deq.bench.baselines import Answer
from deq.bench.cases import AUTO_CASES, TOL, Case, peaceman_rachford
from deq.bench.cli import bench
from deq.bench.quality import Quality, Truth, fastest, relative_error, worst_error
from deq.bench.run import Run, Selection
from deq.bench.timing import Timing

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Case(17, 5)
needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def draw(family, m=200, B=3):
    return families.draw(family, m, B, torch.Generator().manual_seed(0))


def top(W):
    return torch.linalg.eigvals(W).abs().max().item()


class TestFamilies:
    def test_gaussian_by_norm_and_by_radius(self):
        assert torch.linalg.matrix_norm(draw("gaussian0.5")[0], 2).item() == pytest.approx(0.5, rel=0.05)
        assert top(draw("radius0.8")[0]) == pytest.approx(0.8, rel=0.1)

    def test_orthogonal_and_symmetric(self):
        W, _ = draw("orthogonal0.7")
        torch.testing.assert_close(W @ W.mT, 0.49 * torch.eye(200, dtype=W.dtype))
        W, _ = draw("symmetric0.99")
        assert torch.equal(W, W.mT)
        assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(0.99)

    def test_outlier_is_a_real_eigenvalue_with_a_non_negative_eigenvector(self):
        W, c = draw("outlier0.95", B=500)
        values, vectors = torch.linalg.eig(W)
        i = values.abs().argmax()
        assert values[i].item() == pytest.approx(0.95)
        assert torch.linalg.vector_norm(vectors[:, i].real).item() == pytest.approx(1)
        assert (vectors[:, i].real * vectors[:, i].real.sum().sign() >= -1e-12).all()
        assert sorted(values.abs().tolist())[-2] < 0.8
        assert c.mean().item() == pytest.approx(0.3, abs=0.02)

    @pytest.mark.parametrize("mu", [0.1, 1.0])
    def test_monotone(self, mu):
        W, _ = draw(f"monotone{mu}")
        smallest = torch.linalg.eigvalsh(torch.eye(200, dtype=W.dtype) - (W + W.mT) / 2).min().item()
        assert mu - 1e-9 < smallest < mu + 0.05
        assert top(W) > 1

    @pytest.mark.parametrize("family", ["", "0.9", "gauss1", "gaussian-1", "gaussian0.9x", "gaussian.5", "rádius1"])
    def test_unknown(self, family):
        with pytest.raises(ValueError, match=r"family must be one of gaussian, radius, .*trained"):
            families.split(family)

    def test_trained_weights_exist_for_what_was_trained(self):
        for family, m, B, text in (
            ("trained10", 64, 1, "m must be 128"),
            ("trained9", 128, 1, "epoch must be 10 or 15 or 20"),
            ("trained10", 128, 9999, "B must be at most 2048"),
        ):
            with pytest.raises(ValueError, match=text):
                draw(family, m, B)

    @needs_library
    def test_trained_weights_have_learned_and_have_slow_parallel_steps(self, monkeypatch):
        monkeypatch.setattr(trained, "EPOCHS", (2, 10))
        weights = trained._train.__wrapped__(10)
        steps = {}
        for epoch, (W, c) in weights.items():
            c, z, step, cosine = c[:256], torch.zeros(256, trained.WIDTH, dtype=W.dtype), None, None
            for _ in range(10):
                new = torch.relu(z @ W.mT + c)
                cosine = step if step is None else torch.cosine_similarity(step, new - z, dim=1).mean().item()
                z, step = new, new - z
            steps[epoch] = cosine
        assert steps[10] > 0.8
        assert not torch.equal(weights[2][0], weights[10][0])


class TestExact:
    def test_monotone_solution_and_gradient(self):
        problem = Case(24, 6, "monotone0.1", "float64").make()
        z, dW = problem.exact()
        torch.testing.assert_close(torch.relu(z @ problem.W.mT + problem.c), z, rtol=1e-12, atol=1e-12)
        D = torch.diag_embed((z > 0).double())
        u = torch.linalg.solve((torch.eye(24, dtype=z.dtype) - D @ problem.W).mT, problem.g.unsqueeze(-1))
        torch.testing.assert_close((D @ u).squeeze(-1).mT @ z, dW)

    def test_peaceman_rachford_agrees_with_the_plain_iteration_where_both_converge(self):
        problem = Case(24, 6, dtype="float64").make()
        torch.testing.assert_close(peaceman_rachford(problem.W, problem.c, torch.relu), problem.exact()[0])


@pytest.fixture(scope="module")
def truth():
    problem = Case(33, 6).make()
    return Truth(problem, *problem.exact())


class TestQuality:
    def test_a_perfect_answer(self, truth):
        quality = truth.judge(Answer(truth.z.float(), truth.dW.float(), 3))
        assert quality.error < 1e-7
        assert quality.gradient_error < 1e-7
        assert (quality.failed, quality.elsewhere) == (0.0, 0)

    def test_samples_that_fail_by_their_residual_or_by_their_own_word(self, truth):
        z = truth.z.float().clone()
        z[1] *= 1.01
        z[2] = math.nan
        quality = truth.judge(Answer(z, None, 3))
        assert quality.failed == pytest.approx(2 / 6)
        assert quality.error == math.inf
        assert quality.gradient_error is None
        said = torch.tensor([True] * 5 + [False])
        assert truth.judge(Answer(truth.z.float(), None, 3, converged=said)).failed == pytest.approx(1 / 6)

    def test_another_equilibrium_is_no_error(self):
        """z = relu(2 z - 1) in one dimension has the equilibria 0 and 1."""
        W, c, g = torch.tensor([[2.0]]), torch.tensor([[-1.0], [-1.0]]), torch.ones(2, 1)
        problem = type(SMALL.make())(W, c, g)
        truth = Truth(problem, torch.ones(2, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
        quality = truth.judge(Answer(torch.tensor([[1.0], [0.0]]), None, 3))
        assert (quality.error, quality.failed, quality.elsewhere) == (0.0, 0.0, 1)

    def test_an_equilibrium_of_zero_is_met_or_not(self):
        zero = torch.zeros(2, 3, dtype=torch.float64)
        for error in (worst_error, relative_error):
            assert error(zero.float(), zero) == 0 and error(zero.float() + 1e-3, zero) > 1e3

    def test_no_worse_than(self):
        exact, good, bad = (Quality(error, None, 0.0, 0) for error in (0.0, 2e-7, 1e-6))
        assert good.no_worse_than(bad) and good.no_worse_than(exact)
        assert not bad.no_worse_than(good)

    def test_fastest_of_those_that_solve(self, truth):
        import time

        def maker(seconds, z):
            return lambda tol: lambda: (time.sleep(seconds), Answer(z, None, int(1e3 * seconds)))[1]

        right, wrong = truth.z.float(), truth.z.float() * 2
        makers = {"slow": maker(0.03, right), "wrong": maker(0.0, wrong), "quick": maker(0.005, right)}
        best = fastest(makers, truth)
        assert best.label == "quick"
        assert best.quality.failed == 0.0
        assert best.attempts["wrong"] == {"iterations": 0, "failed": 1.0}
        assert fastest({"wrong": makers["wrong"]}, truth).quality.failed == 1.0


class TestMatching:
    @pytest.mark.parametrize("answer", [1, 2, 5, 11])
    def test_first(self, answer):
        asked = []
        assert versus.first(lambda k: asked.append(k) or k >= answer, 12) == answer
        assert 0 not in asked
        assert versus.first(lambda k: False, 12) is None

    def rival(self, truth, gain):
        """A solver whose error is ``gain`` times its tolerance."""
        direction = truth.z / torch.linalg.vector_norm(truth.z, dim=1, keepdim=True) ** 0
        maker = lambda tol: lambda: Answer(truth.z + gain * tol * direction, None, 3)  # noqa: E731
        return versus.solver("rival", maker, truth)

    def test_equal_errors_need_nothing(self, truth):
        assert versus.match(self.rival(truth, 0.5), self.rival(truth, 0.5), truth) == (TOL, TOL)
        assert versus.match(self.rival(truth, 0.3), self.rival(truth, 0.5), truth) == (TOL, TOL)

    def test_ours_is_tightened_to_the_first_step_that_is_no_worse(self, truth):
        ours, theirs = self.rival(truth, 1.0), self.rival(truth, 0.2)
        tol, same = versus.match(ours, theirs, truth)
        assert same == TOL
        assert tol <= 0.2 * TOL < tol * 2**0.5

    def test_theirs_is_loosened_where_ours_cannot_follow(self, truth):
        ours, theirs = self.rival(truth, 8.0), self.rival(truth, 0.05)
        same, tol = versus.match(ours, theirs, truth)
        assert same == TOL
        assert 0.05 * tol >= 8.0 * TOL > 0.05 * tol / 2**0.5


class TestRivals:
    def test_tolerance_reaches_every_rival(self, truth):
        runs = {"loop": lambda tol: baselines.torch_loop(truth.problem, False, tol)}
        runs |= {"deq": lambda tol: baselines.make_engine(truth.problem, False, "auto", tol)()}
        if baselines.has_torchdeq():
            runs |= {
                label: lambda tol, maker=maker: maker(tol)()
                for label, maker in baselines.torchdeq_makers(truth.problem, False).items()
            }
        for name, run in runs.items():
            loose, tight = truth.judge(run(1e-2)), truth.judge(run(1e-6))
            assert tight.error < 5e-6 < loose.error < 0.1, name

    @pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, as it is imported
    @pytest.mark.skipif(not baselines.has_compiler(), reason="no C++ compiler")
    def test_compiled_loop(self, truth):
        problem = truth.problem
        answer, loop = baselines.make_compiled_loop()(problem), baselines.torch_loop(problem)
        assert answer.evaluations == 10 * math.ceil(loop.evaluations / 10)
        assert answer.adjoint_evaluations == 10 * math.ceil(loop.adjoint_evaluations / 10)
        assert truth.judge(answer).no_worse_than(truth.judge(loop))
        assert truth.judge(answer).gradient_error < 1e-5

    @pytest.mark.parametrize("package", jax_baselines.PACKAGES)
    @pytest.mark.parametrize("backward", [False, True])
    def test_jax(self, package, backward, truth):
        pytest.importorskip(package)
        size = float(torch.linalg.vector_norm(truth.z))
        for maker in jax_baselines.makers(package, truth.problem, backward, size).values():
            quality = truth.judge(maker(TOL)())
            assert quality.error < 20 * TOL
            assert (quality.gradient_error is not None) == backward
            assert not backward or quality.gradient_error < 20 * TOL

    def test_jax_runs_with_all_cores_only(self, monkeypatch):
        monkeypatch.setattr(jax_baselines, "find_spec", lambda name: None)
        assert jax_baselines.why_not("jaxopt", 1) == "not installed"
        monkeypatch.setattr(jax_baselines, "find_spec", lambda name: name)
        assert jax_baselines.why_not("jaxopt", 10_000).startswith("XLA uses all")

    def test_gemm_only_without_a_gradient(self):
        run = baselines.make_gemm_only(SMALL.make(), 7, 0)
        with torch.profiler.profile(acc_events=True) as profile:
            run()
        assert {event.key: event.count for event in profile.key_averages()}["aten::mm"] == 7


@needs_library
class TestMeasure:
    def test_rows(self):
        before = torch.get_num_threads()
        measured = list(versus.measure(SMALL, goals.PASSES, (1,), 0.02))
        assert torch.get_num_threads() == before
        assert [rows[0]["pass"] for rows in measured] == list(goals.PASSES)
        for rows in measured:
            by_name = {row["baseline"]: row for row in rows}
            deq, loop, gemm = (by_name[name] for name in ("deq", "loop", "gemm"))
            assert deq["ratio"] == 1.0
            assert deq["failed"] == 0.0
            assert deq["mean_iterations"] <= deq["iterations"]
            assert loop["reached"] == (loop["ratio"] >= loop["must"])
            assert loop["error"] < 1e-4
            assert loop["products"] == loop["iterations"]
            assert loop["matched_ratio"] > 0
            assert gemm["must"] is None
            if loop["pass"] == "forward":  # the loop multiplies in its first evaluation, at zero, too
                assert loop["flops"] == gemm["flops"] == 2 * SMALL.m**2 * SMALL.B * loop["iterations"]
            assert 0 < deq["flops"] <= loop["flops"] * deq["iterations"] / loop["iterations"] and deq["bytes"] > 0
            assert all((row["gradient_error"] is None) == (row["pass"] == "forward") for row in (deq, loop))
            assert json.dumps(rows, allow_nan=False)

    def test_a_rival_that_serves_one_number_of_threads_only(self, monkeypatch):
        """As those of JAX, which take all cores: what matched it there is no match of the next number of threads."""

        def found(case, truth, backward, threads):
            if threads == 1:
                return {"all cores": versus.Rival("all cores", why="takes more")}
            maker = lambda tol: partial(baselines.torch_loop, truth.problem, backward, tol)  # noqa: E731
            return {"all cores": versus.solver("all cores", maker, truth)}

        monkeypatch.setattr(versus, "find_rivals_for_threads", found)
        monkeypatch.setattr(versus, "match", lambda ours, rival, truth: (TOL, 2 * TOL))
        many, one = (
            next(row for row in rows if row["baseline"] == "all cores")
            for rows in versus.measure(SMALL, ("forward",), (2, 1), 0.02)
        )
        assert many["matched_ratio"] > 0 and (one["matched_ratio"], one["why"]) == (None, "takes more")

    def test_rivals_that_fail_say_so_and_have_no_ratio(self):
        (rows,) = versus.measure(Case(40, 6, "monotone0.1"), ("forward",), (1,), 0.02)
        by_name = {row["baseline"]: row for row in rows}
        assert by_name["loop"]["why"] == "does not solve 6 of 6 samples"
        for name in ("loop", "gemm"):
            assert by_name[name]["ratio"] is by_name[name]["matched_ratio"] is by_name[name]["reached"] is None
        assert json.dumps(rows, allow_nan=False)

    def test_several_threads_are_compared_by_their_shortest_calls(self):
        ours, theirs = Timing((1.0, 9.0, 9.0), 0.5), Timing((2.0, 2.0, 2.0), 2.0)
        assert versus._ratio(theirs, ours, 2) == 4.0
        assert versus._ratio(theirs, ours, 1) == pytest.approx(2 / 9)

    def test_scaling(self):
        before = torch.get_num_threads()
        rows = scaling.measure(SMALL, goals.PASSES, 0.02)
        assert torch.get_num_threads() == before
        assert [row["pass"] for row in rows] == list(goals.PASSES)
        assert all(row["ratio"] == row["best_1"] / row["best_2"] for row in rows)


def auto_row(case, baseline, ratio, **other):
    row = {
        "case": case.name,
        "baseline": baseline,
        "variant": baseline,
        "pass": "forward",
        "threads": 2,
        "ratio": ratio,
    }
    row |= {"matched_ratio": ratio, "failed": 0.0, "iterations": 12, "mean_iterations": 10.4, "error": 2e-6}
    return row | {"must": None, "reached": None, "median": 1.2345e-3} | other


class TestGoals:
    def test_must_is_that_of_the_issue(self):
        assert goals.must(Case(128, 256), "torchdeq", "forward") == 6
        assert goals.must(Case(256, 256), "torchdeq", "forward") == 2.5
        assert goals.must(Case(256, 256), "torchdeq", "training") == 3
        assert goals.must(Case(2048, 64), "gemm", "training") == 1.5
        assert goals.must(Case(1024, 4), "gemm", "training") == 4
        assert goals.must(Case(64, 256), "gemm", "forward") is None
        assert goals.must(Case(256, 1), "compiled", "forward") is None

    def test_every_goal_has_cases(self):
        assert all(any(goal.holds_for(case) for case in AUTO_CASES) for goal in goals.GOALS)

    def test_a_group_is_as_good_as_its_worst_case(self):
        cases = [Case(512, 64), Case(1024, 256), Case(256, 256, "monotone0.1")]
        rows = [auto_row(case, "loop", ratio) for case, ratio in zip(cases, (2.0, 8.0, None), strict=True)]
        (verdict,) = goals.judge(cases, rows)
        assert verdict["variant"] == "loop, m >= 256"
        assert (verdict["ratio"], verdict["mean"], verdict["best"], verdict["cases"]) == (2.0, pytest.approx(4), 8.0, 2)
        assert verdict["case"] == cases[0].name
        assert verdict["reached"] is False

    def test_matched_ratios_count_for_trained_weights(self):
        case = Case(128, 256, "trained10")
        verdicts = goals.judge([case], [auto_row(case, "torchdeq", 7.0, matched_ratio=12.0)])
        assert {v["variant"]: (v["ratio"], v["reached"]) for v in verdicts} == {
            "torchdeq, m <= 128": (7.0, True),
            "torchdeq, trained": (12.0, True),
        }

    def test_solutions(self):
        cases = [Case(64, 256), Case(256, 256, "monotone1.0")]
        rows = [auto_row(cases[0], "deq", 1.0, failed=0.25), auto_row(cases[1], "deq", 1.0, iterations=31)]
        verdicts = {v["variant"]: (v["value"], v["reached"]) for v in goals.judge(cases, rows)}
        assert verdicts == {"samples not solved": (0.25, False), "evaluations, monotone": (31, False)}


def selection(**options):
    every = {"shapes": (), "families": (), "passes": goals.PASSES, "threads": (1,), "seconds": 0.02}
    return Selection(**every | options)


class TestSelection:
    def test_pick(self):
        assert selection().pick(AUTO_CASES) == list(AUTO_CASES)
        picked = selection(families=("trained",)).pick(AUTO_CASES)
        assert [case.family for case in picked] == ["trained10", "trained15", "trained20"]
        picked = selection(families=("trained15", "gaussian"), shapes=((128, 256),)).pick(AUTO_CASES)
        assert [case.family for case in picked] == ["gaussian", "trained15"]

    def test_new_shapes_become_cases(self):
        assert selection(shapes=((7, 3), (64, 256))).added() == [Case(7, 3)]
        assert selection(shapes=((7, 3),), families=("radius1.5",)).added() == [Case(7, 3, "radius1.5")]

    def test_a_family_that_a_shape_does_not_have_becomes_a_case_beside_those_that_it_has(self):
        asked = selection(shapes=((64, 256), (7, 3)), families=("radius", "symmetric", "symmetric"))
        assert [case.family for case in asked.pick(AUTO_CASES)] == ["radius1.0"]
        assert asked.added() == [Case(64, 256, "symmetric"), Case(7, 3, "radius"), Case(7, 3, "symmetric")]

    def test_the_plain_table_belongs_to_training(self, tmp_path):
        assert not Run(selection(passes=("forward",)), tmp_path).plain
        assert Run(selection(), tmp_path).plain

    @needs_library
    def test_number_of_steps(self, tmp_path):
        run = Run(selection(shapes=((17, 5), (9, 2))), tmp_path)
        assert len(list(run.steps())) == len(run)
        assert run.results.plain and run.results.auto and run.results.goals


class TestReport:
    def rows(self):
        case = Case(2048, 256, "orthogonal0.99")
        return [
            auto_row(case, "deq", 1.0, failed=0.25, iterations=1000),
            auto_row(case, "loop", 123.45, must=2.5, reached=True, matched_ratio=100.0),
            auto_row(case, "torchdeq", 1.5, must=2.5, reached=False),
            auto_row(case, "gemm", None, matched_ratio=None),
        ]

    def test_choices(self):
        text = render(report.choices(self.rows()))
        assert "…" not in text
        line = next(line for line in text.splitlines() if "2048x256" in line)
        assert re.sub(" +", " ", line.strip()) == "2048x256 1.23 123.5 1.5! - 100.0 1.5 10 1000 2e-06 25%"

    def test_goals_and_scaling(self):
        case = Case(512, 64)
        text = render(report.goals(goals.judge([case], [auto_row(case, "loop", 2.0), auto_row(case, "deq", 1.0)])))
        assert re.search(r"loop, m >= 256 +2.00 \(2.5\)!", text)
        assert re.search(r"samples not solved +0.00 \(0\)", text)
        row = {"case": case.name, "pass": "forward", "ratio": 1.9, "must": 1.85, "reached": True}
        assert re.search(r"gaussian 512x64 +1.90 \(1.85\)", render(report.scaling([row])))

    def test_figure(self, tmp_path):
        from matplotlib.image import imread

        figure.draw(self.rows(), tmp_path / "cpu.png")
        pixels = imread(tmp_path / "cpu.png")[..., :3]
        for name, shown in (("loop", True), ("torchdeq", True)):
            colour = torch.tensor([int(figure.COLOURS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert bool(((torch.tensor(pixels) - colour).abs().amax(-1) < 0.01).any()) is shown
        assert 700 < pixels.shape[1] < 1300


class TestCommand:
    @needs_library
    def test_interrupted_run_keeps_what_is_finished(self, tmp_path, monkeypatch):
        def measure(case, passes, threads, seconds):
            yield [auto_row(case, "deq", 1.0), auto_row(case, "loop", 2.0)]
            raise KeyboardInterrupt

        monkeypatch.setattr(versus, "measure", measure)
        arguments = ["cpu", "--case", "64,256", "--family", "gaussian", "--pass", "forward", "--out", str(tmp_path)]
        result = CliRunner().invoke(bench, [*arguments, "--threads", "1", "--threads", "2"])
        assert result.exit_code == 130
        assert "Interrupted: what was finished is kept." in result.output
        (path,) = tmp_path.glob("*/cpu.json")
        assert [row.get("baseline") for row in json.loads(path.read_text())][:2] == ["deq", "loop"]
        assert path.with_suffix(".png").exists()

    @needs_library
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--family", "gauss"], "family must be one of"),
            (["--family", "trained10", "--case", "64,64"], "m must be 128 with trained weights"),
            (
                ["--family", "trained1.5", "--case", "128,64"],
                "epoch must be 10 or 15 or 20 with trained weights; got 1.5",
            ),
            (["--family", "radius9"], "no case has this shape and family"),
        ],
    )
    def test_bad_selection(self, arguments, text, tmp_path):
        result = CliRunner().invoke(bench, ["cpu", *arguments, "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert text in " ".join(result.output.split())
