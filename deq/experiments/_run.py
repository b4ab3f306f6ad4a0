"""Runs one experiment: settings, parts that survive an interruption, progress, and the files it writes."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import _library
from ..files import replace_text, writing
from ..info import info
from ..profiling import phase
from ._nets import smallest
from ._report import markdown, print_result
from ._result import Result, number, to_json

ONE_THREAD = 2**18  # entries of the largest array of a training step up to which two threads are not worth it
LEVELS = ("quick", "default", "full")  # seconds, for CI; minutes, on two cores; large widths and many seeds, on a GPU
LARGEST_SEED = 2**63 - 1  # torch's generators take twice as much: some experiments count on from the seed
LARGEST_SEEDS = 10_000  # days for most, and more than a sign test needs
TRAINED = 4 * 4  # bytes of a float32 weight, its gradient and Adam's two moments
SCHEMA = 2  # of the JSON file; raise it when a key changes its meaning

Tick = Callable[[float], None]  # called with the finished fraction of a part


class SettingsError(ValueError):
    """Settings that this experiment cannot run with; the message says what is allowed."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on, and nothing else.

    width: neurons of the DEQ. depth: weight matrices of the feed-forward nets, None where an experiment has its own.
    seed: of every random number. seeds: networks trained per model. device: a torch device. level: one of LEVELS; a
    quick run checks every theorem and trains too briefly to judge training. input: a file that the experiment reads.
    """

    width: int
    depth: int | None
    seed: int
    seeds: int
    device: str
    level: str
    input: str | None = None

    @property
    def quick(self) -> bool:
        return self.level == "quick"


@dataclass(frozen=True)
class Choice:
    """One setting of an experiment, why it has this value, and its values in quick and full runs where they differ."""

    value: object
    why: str
    quick: object = None
    full: object = None

    def at(self, level: str) -> object:
        other = {"quick": self.quick, "full": self.full}.get(level)
        return self.value if other is None else other


@dataclass(frozen=True)
class Experiment:
    """One entry of the registry.

    name: as typed in ``deq run NAME``. title: one line. claim: what the paper says, in a sentence or two.
    function: ``Run -> Result``. width_means: what ``--width`` sets; depth_means likewise, empty if it has no depth;
    input_means: what file ``--input`` names, empty if none.
    width, seeds, depth: the defaults of default, quick and full runs. largest_because: said where a larger width is
    refused. holds(width, seeds): bytes that a run has in memory at once, at the least, growing with the width.
    config: every other setting, with its reason.
    needs: packages beyond the required ones.
    """

    name: str
    title: str
    claim: str
    function: Callable[["Run"], Result]
    width_means: str
    width: tuple[int, int, int]
    seeds: tuple[int, int, int] = (1, 1, 1)
    depth: tuple[int, int, int] | None = None
    depth_means: str = ""
    smallest_width: int = 1
    largest_width: int | None = None
    largest_because: str = ""
    holds: Callable[[int, int], int] | None = None
    input_means: str = ""
    config: Mapping[str, Choice] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """What it needs that is not installed, in a sentence; empty if nothing."""
        missing = [package for package in self.needs if find_spec(_IMPORTS.get(package, package)) is None]
        if not missing:
            return ""
        return f"{self.name}: needs {', '.join(missing)}, not installed here; pip install 'deq-engine[experiments]'"

    def settings(
        self,
        *,
        width: int | None = None,
        depth: int | None = None,
        seed: int = 0,
        seeds: int | None = None,
        device: str = "cpu",
        level: str = "default",
        input: str | None = None,
    ) -> Settings:
        """Fill what was not given with this experiment's defaults. Raises SettingsError for what cannot be run."""
        if level not in LEVELS:
            raise SettingsError(f"{self.name}: level must be one of {', '.join(LEVELS)}; got {level!r}")
        at = {"default": 0, "quick": 1, "full": 2}[level]
        width = self.width[at] if width is None else width
        seeds = self.seeds[at] if seeds is None else seeds
        if depth is None:
            depth = self.depth[at] if self.depth else None
        elif not self.depth:
            raise SettingsError(f"{self.name}: has no depth to set; got {depth}")
        limits = [
            ("width", width, self.smallest_width, self.largest_width),
            ("seed", seed, 0, LARGEST_SEED),
            ("seeds", seeds, 1, LARGEST_SEEDS),
        ]
        limits += [("depth", depth, 2, None)] if self.depth else []
        for name, value, low, high in limits:
            if type(value) is not int:
                raise SettingsError(f"{self.name}: {name} must be an integer; got {value!r}")
            if value < low or (high is not None and value > high):
                allowed = f"at least {low}" + (f" and at most {high}" if high else "")
                allowed += f", {self.largest_because}" if name == "width" and self.largest_because else ""
                raise SettingsError(f"{self.name}: {name} must be {allowed}; got {value}")
        has = memory(device)
        if self.holds is not None and has is not None and self.holds(width, seeds) > has:
            widest = smallest(lambda width: self.holds(width, seeds) > has) - 1
            raise SettingsError(
                f"{self.name}: not enough memory for width {width} with {seeds} seed(s), which take at least "
                f"{number(self.holds(width, seeds) / 2**30)} GiB of the {number(has / 2**30)} here; with so many seeds "
                f"width must be at most {widest}"
            )
        if input is not None and not self.input_means:
            raise SettingsError(f"{self.name}: reads no input; got {input}")
        if not isinstance(input, str | None):
            raise SettingsError(f"{self.name}: input must be the path of a file; got {input!r}")
        if self.missing:
            raise SettingsError(self.missing)
        return Settings(width, depth, seed, seeds, device, level, input)


def memory(device: str) -> int | None:
    """Bytes that this machine or its GPU has; None where that is not told."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


_IMPORTS = {"scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Part:
    """A piece of work whose result is JSON, kept on disk as soon as it is finished.

    entries: of the largest array of a step, which decides about threads.
    """

    key: str
    label: str
    compute: Callable[[Tick], object]
    entries: int = 0


class Run:
    """What an experiment's function is given: its settings and a way to run parts."""

    def __init__(self, settings: Settings, config: Mapping[str, Choice], kept: "KeptParts", progress: Progress):
        self.settings = settings
        self.config = SimpleNamespace(**{name: choice.at(settings.level) for name, choice in config.items()})
        self.device = torch.device(settings.device)
        self.threads = 1  # the most that any part used
        self.resumed: list[str] = []
        self.seconds: dict[str, float] = {}
        self._kept = kept
        self._progress = progress

    @contextmanager
    def threads_for(self, entries: int) -> Iterator[None]:
        """One thread where the arrays of a step have few entries, else what torch was set to. There, threads gain
        little even on idle cores, and waiting for each other on busy ones makes training ten times slower."""
        before = torch.get_num_threads()
        if entries <= ONE_THREAD:
            torch.set_num_threads(1)
        self.threads = max(self.threads, torch.get_num_threads())
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def generator(self, purpose: str, device: torch.device | str | None = None) -> torch.Generator:
        """Random numbers that depend on the seed and ``purpose`` only, not on which parts ran before.

        device: where tensors are drawn, the run's if None: torch fills none elsewhere.
        """
        digest = hashlib.sha256(f"{self.settings.seed}/{purpose}".encode()).digest()
        return torch.Generator(device or self.device).manual_seed(int.from_bytes(digest[:6], "big"))

    def parts(self, parts: Sequence[Part]) -> dict[str, dict]:
        """Run every part that is not kept from an interrupted run; results by key, in order."""
        done = {p.key: self._kept.values[p.key] for p in parts if p.key in self._kept.values}
        self.resumed += done
        self.seconds |= {key: self._kept.seconds[key] for key in done}
        self.threads = max([self.threads, *(self._kept.threads[key] for key in done)])
        if done:
            self._progress.console.print(f"Resuming: {len(done)} of {len(parts)} parts are kept from an earlier run.")
        task = self._progress.add_task("", total=len(parts), completed=len(done))
        for part in parts:
            if part.key in done:
                continue
            self._progress.update(task, description=part.label)
            base, start = len(done), time.perf_counter()
            with self.threads_for(part.entries), phase(part.label):
                threads = torch.get_num_threads()
                value = part.compute(lambda share, base=base: self._progress.update(task, completed=base + share))
            self.seconds[part.key] = round(time.perf_counter() - start, 3)
            done[part.key] = self._kept.keep(part.key, value, self.seconds[part.key], threads)
            self._progress.update(task, completed=len(done))
            self._progress.console.print(f"  {part.label:<58}{self.seconds[part.key]:8.1f} s", highlight=False)
        return {p.key: done[p.key] for p in parts}


class KeptParts:
    """Finished parts in one file, with the seconds that they took and the threads, valid for one fingerprint."""

    def __init__(self, path: Path, fingerprint: str):
        self.path = path
        self.fingerprint = fingerprint
        self.values: dict[str, object] = {}
        self.seconds: dict[str, float] = {}
        self.threads: dict[str, int] = {}
        try:
            stored = json.loads(path.read_text())
            if stored["fingerprint"] == fingerprint:
                self.values, self.seconds, self.threads = (stored[key] for key in ("parts", "seconds", "threads"))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # nothing kept, or nothing that can be read: compute everything
        if not self.values:
            self.forget()

    def keep(self, key: str, value: object, seconds: float, threads: int) -> object:
        """Write ``value`` to disk and return it as a resumed run would read it."""
        self.values[key] = json.loads(json.dumps(to_json(value), allow_nan=False))
        self.seconds[key], self.threads[key] = seconds, threads
        kept = {"fingerprint": self.fingerprint, "parts": self.values, "seconds": self.seconds, "threads": self.threads}
        replace_text(self.path, json.dumps(kept))
        return self.values[key]

    @writing()
    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def parts_path(out: Path, name: str, settings: Settings) -> Path:
    """Where the finished parts of an interrupted run are kept: other settings, another input or other code have a file
    of their own. Raises SettingsError for an input that cannot be read."""
    return _parts_path(out, name, _fingerprint(name, settings))


def _parts_path(out: Path, name: str, fingerprint: str) -> Path:
    return out / f"{name}.{fingerprint[:8]}.parts.json"


@writing()
def forget_parts(paths: Iterable[Path]) -> None:
    """Forget the finished parts in these files: their runs are all done, and the next one is a new one."""
    for path in paths:
        path.unlink(missing_ok=True)


def execute(experiment: Experiment, settings: Settings, out: Path, console: Console) -> Result:
    """Run, print the short report and write ``<name>.json``, ``<name>.png`` and ``<name>.md`` into ``out``.

    What is finished is kept in :func:`parts_path`, and a run with the same settings, input and code starts from it:
    also after KeyboardInterrupt, which passes through, and until :func:`forget_parts`.
    """
    from ._plot import save  # matplotlib takes a second to import

    with writing():
        out.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{experiment.name}[/]  {experiment.title}", highlight=False)
    fingerprint, digest = _fingerprint(experiment.name, settings), _input_digest(settings)
    kept = KeptParts(_parts_path(out, experiment.name, fingerprint), fingerprint)
    started, start = datetime.now(timezone.utc), time.perf_counter()
    columns = (TextColumn("  {task.description:<48}"), BarColumn(bar_width=16), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        run = Run(settings, experiment.config, kept, progress)
        result = experiment.function(run)

    record = {
        "schema": SCHEMA,
        "experiment": experiment.name,
        "title": experiment.title,
        "claim": experiment.claim,
        "settings": asdict(settings),
        "config": {name: {"value": c.at(settings.level), "why": c.why} for name, c in experiment.config.items()},
        "provenance": {
            **_provenance(run),
            "input_sha256": digest,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start + sum(run.seconds[key] for key in run.resumed), 2),
            "seconds_per_part": run.seconds,
            "resumed_parts": run.resumed,
        },
        "verdict": result.verdict,
        "claims": [asdict(c) for c in result.claims],
        "tables": [asdict(t) for t in result.tables],
        "notes": list(result.notes),
        "values": result.values,
    }
    with writing():
        save(result.figure, out / f"{experiment.name}.png")
    replace_text(out / f"{experiment.name}.json", json.dumps(to_json(record), indent=1, allow_nan=False) + "\n")
    replace_text(out / f"{experiment.name}.md", markdown(experiment, settings, result))
    print_result(console, result)
    seconds = number(record["provenance"]["seconds"])
    wrote = f"Wrote {out / experiment.name}.json, .md and .png in {seconds} s."
    console.print(wrote, highlight=False, soft_wrap=True, markup=False)  # a path may hold what rich takes for a tag
    return result


def _fingerprint(name: str, settings: Settings) -> str:
    """Of everything a part's value depends on: settings, what the input holds, torch, and this package."""
    depends = asdict(settings) | {"input": _input_digest(settings)}
    return hashlib.sha256(json.dumps([name, depends, torch.__version__, _code_digest()]).encode()).hexdigest()


def _input_digest(settings: Settings) -> str | None:
    """SHA-256 of the file that the settings name; None if they name none."""
    if settings.input is None:
        return None
    try:
        return hashlib.sha256(Path(settings.input).read_bytes()).hexdigest()
    except OSError as error:
        raise SettingsError(f"cannot read {settings.input}: {error.strerror}") from error


@lru_cache(maxsize=1)  # of the code that this process began with, also where files change while it runs
def _code_digest() -> str:
    """SHA-256 of every line of Python in this package, kernels/ too, and of the compiled library where there is one."""
    digest = hashlib.sha256()
    kernels = find_spec("deq.kernels").submodule_search_locations  # in a checkout not below deq/
    folders = Path(__file__).parents[1], *map(Path, kernels)
    compiled = [] if _library.compiled is None else [_library.path]
    for path in (*(path for folder in folders for path in sorted(folder.rglob("*.py"))), *compiled):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _provenance(run: Run) -> dict:
    commit, modified = _commit()
    installed = info()
    packages = ("torch", "numpy", "matplotlib")
    return {
        "commit": commit,
        "modified": modified,
        "versions": {"deq": installed.deq, "python": installed.python} | {p: metadata.version(p) for p in packages},
        "platform": installed.platform,
        "compiled": installed.library is not None,
        "isa": installed.isa,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
        "threads": run.threads,
    }


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that tracks this file, and whether it was modified; None for an installed package."""

    def git(*args: str) -> str:
        where = Path(__file__).parent
        return subprocess.run(["git", "-C", where, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
