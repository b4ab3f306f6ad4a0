"""``deq bench compare BASE [HEAD]``: is HEAD slower than BASE? Both commits are built and run in turns, in one job.

Each commit gets a checkout and a build of its own in a temporary folder, and a process that imports its package; the
processes solve the same problems one after the other, a few milliseconds each, so that whatever the machine does hits
both. One number a process pair: the median over turns of time(HEAD) / time(BASE), of processor time, which others
cannot take. Pairs are started anew (``PAIRS``), because where a process's memory happens to lie moves times by a few
percent; the ratio of a case is the median over pairs, its spread their standard deviation. A ratio above
1 + max(5 %, 3 x spread) fails, if it does so again when the case is measured once more with twice the pairs.

No case is timed before both commits have solved it correctly: the answer of every sample at most twice as wrong as that
of the loop a user writes, plus 2 ulp. This file is the program of the processes too, so that it must do with the public
functions of either commit: ``deq.solve`` alone.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

TURNS, TURN_SECONDS = 15, 4e-3
PAIRS = 3
LEAST, SPREADS = 0.05, 3
TOL = 1e-5


@dataclass(frozen=True)
class Job:
    """One timed problem: a Gaussian W of 2-norm ``norm``, forward, or forward and backward with a W that is new."""

    m: int
    B: int
    solver: str = "auto"
    activation: str = "relu"
    trains: bool = False
    norm: float = 0.9

    @property
    def name(self) -> str:
        return f"{self.m} x {self.B} {self.activation} {self.solver}" + (" training" if self.trains else "")


JOBS = (
    Job(32, 1),
    Job(64, 256, "plain"),
    Job(256, 64),
    Job(256, 64, "plain", "tanh"),
    Job(256, 64, trains=True),
    Job(512, 16, "anderson", norm=1.8),
)


@dataclass(frozen=True)
class Verdict:
    """Of one job: HEAD's time over BASE's, its spread over pairs of processes, seconds a call of either."""

    job: Job
    ratio: float
    spread: float
    base: float
    head: float

    @property
    def limit(self) -> float:
        return 1 + max(LEAST, SPREADS * self.spread)

    @property
    def fails(self) -> bool:
        return self.ratio > self.limit


def judge(job: Job, pairs: Sequence[Sequence[tuple[float, float]]]) -> Verdict:
    """From the turns (seconds of BASE, of HEAD) of every pair of processes."""
    ratios = [statistics.median(head / base for base, head in turns) for turns in pairs]
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    base, head = (statistics.median(turn[i] for turns in pairs for turn in turns) for i in (0, 1))
    return Verdict(job, statistics.median(ratios), spread, base, head)


class Worker:
    """A process whose deq is the one in ``site``; it solves what it is asked to and says how long a call took."""

    def __init__(self, site: Path):
        others = [entry for entry in sys.path if entry]  # after ``site``, whose deq is found first
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__],  # -S: no .pth file, so that an editable install cannot answer the import
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(site), *others))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which then closes the pipes
        )

    def ask(self, **question) -> float:
        """RuntimeError with what the process said if it could not answer."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer or "error" in (answer := json.loads(answer)):
            raise RuntimeError(answer["error"] if answer else "the process died")
        return answer["seconds"]

    def close(self) -> None:
        with suppress(BrokenPipeError), self._process:  # closes its pipes, which ends it, and waits
            pass


def run(
    sites: tuple[Path, Path],
    jobs: Sequence[Job] = JOBS,
    pairs: int = PAIRS,
    report: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """BASE's and HEAD's packages against each other. RuntimeError naming the side and the job that is not solved."""
    verdicts = _measure(sites, jobs, pairs)
    slow = [v.job for v in verdicts if v.fails]
    if slow:
        again = {v.job: v for v in _measure(sites, slow, 2 * pairs)}
        verdicts = [again.get(v.job, v) for v in verdicts]
    for verdict in verdicts:
        report(verdict)
    return verdicts


def _measure(sites: tuple[Path, Path], jobs: Sequence[Job], pairs: int) -> list[Verdict]:
    turns: dict[Job, list[list[tuple[float, float]]]] = {job: [] for job in jobs}
    for pair in range(pairs):
        with ExitStack() as stack:
            workers = []
            for site in sites:
                worker = Worker(site)
                stack.callback(worker.close)
                workers.append(worker)
            for job in jobs:
                for side, worker in zip(("BASE", "HEAD"), workers, strict=True):
                    try:
                        worker.ask(prepare=asdict(job))
                    except RuntimeError as error:
                        raise RuntimeError(f"{side} does not solve {job.name}: {error}") from error
                turns[job].append([_turn(workers, (turn + pair) % 2) for turn in range(TURNS)])
    return [judge(job, turns[job]) for job in jobs]


def _turn(workers: list[Worker], first: int) -> tuple[float, float]:
    seconds = [0.0, 0.0]
    for side in (first, 1 - first):
        seconds[side] = workers[side].ask(time=TURN_SECONDS)
    return seconds[0], seconds[1]


@contextmanager
def built(commits: Sequence[str], repository: Path) -> Iterator[list[Path]]:
    """A folder for every commit with its package in it, built. RuntimeError with what git or cmake said."""
    with tempfile.TemporaryDirectory() as folder:
        sites = []
        try:
            for i, commit in enumerate(commits):
                site = Path(folder) / f"{i}"
                _call("git", "-C", str(repository), "worktree", "add", "--detach", str(site), commit)
                sites.append(site)
                build(site)
            yield sites
        finally:
            for site in sites:
                _call("git", "-C", str(repository), "worktree", "remove", "--force", str(site))


def build(site: Path) -> None:
    """Compile the library of a checkout into its package."""
    out = site / "build" / "compare"
    generator = ("-G", "Ninja") if _has("ninja") else ()
    _call("cmake", "-S", str(site), "-B", str(out), *generator, "-DDEQ_CUDA=OFF")
    _call("cmake", "--build", str(out), "--target", "deq", "--parallel", "2")
    for name in ("libdeq.so", "_build.json"):
        (site / "deq" / name).write_bytes((out / name).read_bytes())


def _environment() -> dict[str, str]:
    """That of this process, and after its PATH the folder of its Python, where pip puts cmake and ninja."""
    path = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent))
    return os.environ | {"PATH": os.pathsep.join(path)}


def _has(program: str) -> bool:
    return shutil.which(program, path=_environment()["PATH"]) is not None


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    except OSError as error:
        raise RuntimeError(f"{command[0]} is needed here and cannot be run: {error.strerror}.") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


# ---- what runs in the processes ------------------------------------------------------------------------------------


def _serve() -> None:
    torch.set_num_threads(1)
    call = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "prepare" in question:
                call = _prepare(Job(**question["prepare"]))
                answer = {"seconds": 0.0}
            else:
                answer = {"seconds": _time(call, question["time"])}
        except Exception as error:  # whatever it was, the parent says it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _prepare(job: Job) -> Callable[[], object]:
    import deq

    generator = torch.Generator().manual_seed(job.m + job.B)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    exact_W, exact_c = draw(job.m, job.m) * (job.norm / 2 / job.m**0.5), draw(job.B, job.m)
    W, c, g = exact_W.float(), exact_c.float(), draw(job.B, job.m).float()
    W.requires_grad_(job.trains)
    c.requires_grad_(job.trains)
    entry, step, count = W[0, 0].item(), torch.finfo(W.dtype).eps, 0

    def call():
        nonlocal count
        if not job.trains:
            return deq.solve(W, c, job.activation, solver=job.solver, tol=TOL, on_failure="raise").z
        count += 1
        with torch.no_grad():
            W[0, 0] = entry * (1 + count * step)
        z = deq.solve(W, c, job.activation, solver=job.solver, tol=TOL, on_failure="raise").z
        torch.autograd.grad(z, (W, c), g)
        return z.detach()

    act = {"relu": torch.relu, "tanh": torch.tanh}[job.activation]
    truth = _loop(exact_W, exact_c, act, 1e-13)
    allowed = 2 * _worst(_loop(W.detach(), c.detach(), act, TOL), truth) + 2 * torch.finfo(W.dtype).eps
    if (error := _worst(call(), truth)) > allowed:
        raise ArithmeticError(f"its worst error is {error:.1e}; at most {allowed:.1e} is right")
    return call


def _loop(W, c, act, tol: float):
    z = torch.zeros_like(c)
    for _ in range(5000):
        z, before = act(torch.addmm(c, z, W.mT)), z
        if ((z - before).norm(dim=1) <= tol * z.norm(dim=1)).all():
            break
    return z


def _worst(z, truth) -> float:
    return float(((z.double() - truth).norm(dim=1) / truth.norm(dim=1)).max())


def _time(call: Callable[[], object], seconds: float) -> float:
    """Processor seconds of the fastest of the calls that fit into ``seconds``, three at least."""
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
        calls += 1
    return best


if __name__ == "__main__":
    _serve()
