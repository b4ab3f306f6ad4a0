"""bench/compare.py: two packages in turns. Building commits takes a minute; here both sides are this package."""

import os
import shutil
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import deq
from deq import _library
from deq.bench import compare, report

SITE = Path(deq.__file__).resolve().parents[1]
JOB = compare.Job(32, 8)
pytestmark = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


def copy_of_package(folder, **replaced):
    """The package in ``folder``, with functions of deq/solve.py replaced by what follows their definition."""
    shutil.copytree(SITE / "deq", folder / "deq", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("bench", "kernels"):
        (folder / part).symlink_to(SITE / part)
    for name in ("libdeq.so", "_build.json"):
        shutil.copy(Path(_library.path).parent / name, folder / "deq" / name)
    with (folder / "deq" / "__init__.py").open("a") as file:
        file.write(replaced.get("appended", ""))
    return folder


SLOWER = """
_solve = solve
def solve(*arguments, **options):
    _solve(*arguments, **options)
    return _solve(*arguments, **options)
"""
WRONG = """
_solve = solve
def solve(*arguments, **options):
    solution = _solve(*arguments, **options)
    solution.z = solution.z * 1.001
    return solution
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return copy_of_package(tmp_path_factory.mktemp("base"))


def test_no_difference_passes_and_a_slowed_solve_fails(base, tmp_path):
    slow = copy_of_package(tmp_path, appended=SLOWER)
    (same,) = compare.run((base, base), [JOB], pairs=1)
    assert not same.fails
    (slowed,) = compare._measure((base, slow), [JOB], pairs=1)  # run() would measure it once more
    assert slowed.fails and slowed.ratio > same.ratio


def test_what_is_not_right_is_not_timed(base, tmp_path):
    wrong = copy_of_package(tmp_path, appended=WRONG)
    with pytest.raises(
        RuntimeError, match=r"HEAD does not solve 32 x 8 relu auto: ArithmeticError: its worst error is 1"
    ):
        compare.run((base, wrong), [JOB], pairs=1)


@pytest.mark.parametrize("job", compare.JOBS, ids=lambda job: job.name)
def test_every_job_is_solved_right(job):
    assert compare._time(compare._prepare(job), 0.0) > 0


def test_limits():
    turns = lambda *ratios: [[(1.0, r)] * 5 for r in ratios]  # noqa: E731
    calm = compare.judge(JOB, turns(1.04, 1.041, 1.039))
    assert calm.limit == 1.05 and not calm.fails
    assert compare.judge(JOB, turns(1.06, 1.061, 1.059)).fails
    noisy = compare.judge(JOB, turns(1.0, 1.1, 1.2))
    assert noisy.ratio == pytest.approx(1.1) and noisy.limit == pytest.approx(1.3) and not noisy.fails
    assert compare.judge(JOB, turns(2.0)).fails


def test_a_failure_is_measured_again(monkeypatch):
    first = [compare.Verdict(job, ratio, 0.0, 1.0, ratio) for job, ratio in zip(compare.JOBS, (1.2, 1.0), strict=False)]
    asked = []

    def measure(sites, jobs, pairs):
        asked.append((list(jobs), pairs))
        return first if len(asked) == 1 else [compare.Verdict(compare.JOBS[0], 1.01, 0.0, 1.0, 1.01)]

    monkeypatch.setattr(compare, "_measure", measure)
    verdicts = compare.run((SITE, SITE), compare.JOBS[:2])
    assert asked == [(list(compare.JOBS[:2]), compare.PAIRS), ([compare.JOBS[0]], 2 * compare.PAIRS)]
    assert [v.ratio for v in verdicts] == [1.01, 1.0]
    console = Console(width=80, record=True, file=StringIO())
    console.print(report.verdicts([*verdicts, compare.Verdict(JOB, 2.0, 0.01, 1e-3, 2e-3)]))
    text = console.export_text()
    assert "2.000 (1.05)!" in text and max(map(len, text.splitlines())) <= 80


def test_commits_get_checkouts_of_their_own(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    git = ("git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e@e")
    subprocess.run((*git, "init", "-q"), check=True)
    for text in ("one", "two"):
        (repository / "file").write_text(text)
        subprocess.run((*git, "add", "."), check=True)
        subprocess.run((*git, "commit", "-qm", text), check=True)
    monkeypatch.setattr(compare, "build", lambda site: None)
    with compare.built(("HEAD~1", "HEAD"), repository) as sites:
        assert [(site / "file").read_text() for site in sites] == ["one", "two"]
    assert not any(site.exists() for site in sites)
    listed = subprocess.run((*git, "worktree", "list"), check=True, capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1
    with pytest.raises(RuntimeError, match="nowhere"), compare.built(("nowhere",), repository):
        pass


def test_a_program_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="git is needed here and cannot be run: No such file"):
        compare._call("git", "--version")
    beside = tmp_path / "bin"
    beside.mkdir()
    shutil.copy("/bin/true", beside / "git")
    monkeypatch.setattr("sys.executable", str(beside / "python"))
    compare._call("git", "--version")


def test_ctrl_c_is_not_for_the_processes(base):
    """Each would print where it was; they end when the parent does."""
    worker = compare.Worker(base)
    assert os.getpgid(worker._process.pid) != os.getpgid(0)
    worker.close()
    assert worker._process.returncode == 0


def test_a_process_that_dies_is_an_error_in_words(base):
    worker = compare.Worker(base)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RuntimeError, match="the process died"):
        worker.ask(time=0.0)
    worker.close()
