"""The command ``deq``."""

import difflib
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import click

from . import __version__
from .activations import ACTIVATIONS
from .bench import families
from .bench.cli import bench
from .bench.options import Seconds, cannot_write, need_folder
from .files import CannotWrite, replace_text
from .plan import DEFAULT_TOL, SOLVERS


class Interruptible(click.Group):
    """Ctrl-C ends every command with exit code 130, and a reader that has gone, as of ``| head``, with 141, as it ends
    other programs; click's own and rich's would be 1, that of a theorem that failed."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except (BrokenPipeError, SystemExit) as error:
            if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):  # rich's
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere at exit
            ctx.exit(141)
        except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
            if not (isinstance(error, MemoryError) or any(words in str(error) for words in _OF_MEMORY)):
                raise
            why = str(error).strip().partition("\n")[0]  # Python's own MemoryError says nothing
            lacking = click.ClickException(f"not enough memory for this size{': ' if why else ''}{why}")
            lacking.exit_code = 2  # that of bad options: 1 is that of a theorem that failed
            raise lacking from error


# What torch's errors say, which are RuntimeErrors like others, and what is said of sizes beyond 64 bits.
_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "overflowed with sizes",
    "Overflow when unpacking",
    "index-sized integer",
)


@click.group(cls=Interruptible, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deq")
def main() -> None:
    """Deep equilibrium models in PyTorch: experiments, profiles, benchmarks, and facts about this installation."""


@main.command()
def info() -> None:
    """Show what is compiled, loaded and usable here, and why not if not."""
    import deq

    click.echo(deq.info())


def _list_experiments(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from .experiments import REGISTRY

    column = max(map(len, REGISTRY)) + 2
    for experiment in REGISTRY.values():
        click.secho(f"{experiment.name:<{column}}{experiment.title}", bold=True)
        text = f"{experiment.claim} Width: {experiment.width_means} (default {experiment.width[0]})."
        if experiment.depth:
            text += f" Depth: {experiment.depth_means} (default {experiment.depth[0]})."
        if experiment.input_means:
            text += f" Input: {experiment.input_means}."
        click.echo(click.wrap_text(text, 78, " " * column, " " * column))
    ctx.exit()


@main.command()
@click.argument("experiment", required=False, metavar="EXPERIMENT|all|RESULT.json")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_experiments, help="List them.")
@click.option("--width", type=click.IntRange(min=1), help="Neurons of the DEQ; --list says what it means for each.")
@click.option(
    "--depth", type=click.IntRange(min=2), help="Weight matrices of the feed-forward nets, where --list has it."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all random numbers.")
@click.option("--seeds", type=click.IntRange(min=1), help="Networks trained per model.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--input", type=click.Path(exists=True, dir_okay=False), help="A file to read, where --list has it.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder for the JSON results, figures, tables and, for all, the ledger of claims.",
)
@click.option("--quick", is_flag=True, help="Seconds instead of minutes: checks every theorem, trains briefly.")
@click.option("--full", is_flag=True, help="Large widths and many seeds, meant for a GPU.")
@click.pass_context
def run(
    ctx: click.Context,
    experiment: str | None,
    width: int | None,
    depth: int | None,
    seed: int,
    seeds: int | None,
    device: str,
    input: str | None,
    out: Path,
    quick: bool,
    full: bool,
) -> None:
    """Run an experiment of the paper, or all of them, or one again exactly as its JSON result says.

    Writes EXPERIMENT.json, .png and .md into --out; "all" also the ledger of claims, index.html and README.md.

    Exit code 0: every proved claim held; 1: one did not; 2: bad options; 130: interrupted, and the same command goes on
    where it stopped; 141: so is the run of which nobody reads what it prints.
    """
    from rich.console import Console

    from .experiments import REGISTRY, SettingsError, execute, forget_parts, parts_path, write_ledger

    if quick and full:
        raise click.UsageError("--quick and --full exclude each other.")
    options = {"width": width, "depth": depth, "seed": seed, "seeds": seeds, "device": _device(device)}
    options["input"] = input
    options["level"] = "quick" if quick else "full" if full else "default"
    recorded, left_out = None, []
    try:
        if experiment is not None and experiment.endswith(".json"):
            recorded = _recorded(ctx, experiment)
            name, given = recorded["experiment"], recorded["settings"]
            settings = {name: REGISTRY[name].settings(**given | {"device": _device(given.get("device", "cpu"))})}
        else:
            names = _names(experiment, list(REGISTRY))
            if experiment == "all":
                left_out = [REGISTRY[name].missing for name in names if REGISTRY[name].missing]
                names = [name for name in names if not REGISTRY[name].missing]
            settings = {name: REGISTRY[name].settings(**_that_fit(REGISTRY[name], names, options)) for name in names}
        parts = {name: parts_path(out, name, of_it) for name, of_it in settings.items()}
    except SettingsError as error:
        raise click.UsageError(f"{error}.") from error
    need_folder(out)
    console = Console()
    violated = []
    for name, options in settings.items():
        try:
            result = execute(REGISTRY[name], options, out, console)
        except SettingsError as error:  # a file that cannot be read as what it has to be
            raise click.UsageError(f"{error}.") from error
        except CannotWrite as error:  # the disk is full, say; another OSError is no matter of --out
            raise cannot_write(out, error) from error
        except KeyboardInterrupt:
            where = (
                f"finished parts are kept in {parts[name]}; the same command resumes them"
                if parts[name].exists()
                else "no part was finished"
            )
            click.echo(f"Interrupted {name}: {where}.", err=True)
            ctx.exit(130)
        violated += [f"{name}: this proved claim does not hold: {claim.sentence()}." for claim in result.violated]
        if recorded is not None:
            click.echo(_compare(recorded, out / f"{name}.json"))
    try:
        forget_parts(parts.values())
        ledger = write_ledger(out, REGISTRY) if experiment == "all" else []
    except CannotWrite as error:
        raise cannot_write(out, error) from error
    if ledger:
        click.echo(f"Wrote the ledger of claims: {', '.join(map(str, ledger))}.")
    for sentence in (*(f"Left out: {missing}." for missing in left_out), *violated):
        click.echo(sentence, err=True)
    ctx.exit(1 if violated else 0)


def _that_fit(experiment, names: list[str], options: dict) -> dict:
    """Of several experiments, those without depth or input leave it out; one alone says that it has none."""
    if len(names) == 1:
        return options
    unused = [name for name, used in (("depth", experiment.depth), ("input", experiment.input_means)) if not used]
    return options | dict.fromkeys(unused)


def _recorded(ctx: click.Context, path: str) -> dict:
    """The record of an earlier run, whose settings admit no others."""

    given = [p for p in ctx.params if p != "out" and ctx.get_parameter_source(p).name == "COMMANDLINE"]
    if given != ["experiment"]:
        extra = ", ".join(f"--{p}" for p in given if p != "experiment")
        raise click.UsageError(f"{path} says how to run; leave out {extra}.")
    try:
        record = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise click.BadParameter(f"there is no file {path}.", param_hint="EXPERIMENT") from error
    except OSError as error:
        raise click.BadParameter(f"cannot read {path}: {error.strerror}.", param_hint="EXPERIMENT") from error
    except ValueError as error:
        raise click.BadParameter(f"{path} is no result of deq run: {error}.", param_hint="EXPERIMENT") from error
    wrong = _misfit(record)
    if wrong:
        raise click.BadParameter(f"{path} cannot be run again: {wrong}.", param_hint="EXPERIMENT")
    return record


def _misfit(record: object) -> str:
    """Why this is no record of an experiment, in words; empty if it is one."""
    from .experiments import REGISTRY, SCHEMA, Settings

    record = record if isinstance(record, dict) else {}
    for key, kind in (("experiment", str), ("settings", dict)):
        if not isinstance(record.get(key), kind):
            return f'it has no "{key}"'
    name = record["experiment"]
    if name not in REGISTRY:
        return f"there is no experiment {name!r}"
    if record.get("schema") != SCHEMA:
        return f"another version of deq wrote it: it has schema {record.get('schema')!r}, and this one reads {SCHEMA}"
    for setting in record["settings"]:
        if setting not in {field.name for field in fields(Settings)}:
            return f"its settings hold {setting!r}, which {name} does not have"
    may_be_none = {"input"} if REGISTRY[name].depth else {"input", "depth"}
    for setting in (field.name for field in fields(Settings)):  # a default would be another run
        if setting not in record["settings"] or (record["settings"][setting] is None and setting not in may_be_none):
            return f'its settings lack "{setting}"'
    for key, kind in (("values", dict), ("claims", list), ("provenance", dict)):  # what the new run is compared with
        if not isinstance(record.get(key), kind):
            return f'it has no "{key}"'
    if not isinstance(record["provenance"].get("versions"), dict):
        return 'its "provenance" has no "versions"'
    if not all(isinstance(claim, dict) and {"statement", "measured"} <= claim.keys() for claim in record["claims"]):
        return 'one of its "claims" lacks a "statement" or what was "measured"'
    return ""


def _compare(recorded: dict, path: Path) -> str:
    again = json.loads(path.read_text())
    before, now = (record["provenance"].get("input_sha256") for record in (recorded, again))
    differ = []
    if before not in (None, now):
        differ = [f"the input {again['settings']['input']} has changed: sha256 {before} was recorded, {now} read"]
    if again["values"] == recorded["values"]:
        return "\n  ".join(("Every value is the recorded one.", *differ))
    old, new = ({c["statement"]: c["measured"] for c in record["claims"]} for record in (recorded, again))
    for statement in old | new:
        if statement not in new:
            differ.append(f"{statement}: this version of deq makes no such claim")
        elif statement not in old:
            differ.append(f"{statement}: the version of deq that wrote the record made no such claim")
        elif old[statement] != new[statement]:
            differ.append(f"{statement}: {old[statement]!r} was recorded, {new[statement]!r} measured")
    versions = ", ".join(f"{k} {v}" for k, v in recorded["provenance"]["versions"].items())
    return "\n  ".join((f"Values differ from the recorded ones (made with {versions}).", *differ))


@main.command()
@click.option("--width", type=click.IntRange(min=1), default=1024, show_default=True, help="Neurons m.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Samples B.")
@click.option(
    "--family",
    default="gaussian",
    show_default=True,
    help=f"How W is drawn: {', '.join(families.names())}, with a number or without, as in `deq bench cpu`.",
)
@click.option("--activation", type=click.Choice(list(ACTIVATIONS)), default="relu", show_default=True)
@click.option("--dtype", type=click.Choice(list(DEFAULT_TOL)), default="float32", show_default=True)
@click.option("--solver", type=click.Choice(SOLVERS), default="auto", show_default=True)
@click.option("--depth", type=click.IntRange(min=1), default=3, show_default=True, help="Of the feed-forward nets.")
@click.option(
    "--seconds",
    type=Seconds(),
    default=2.0,
    show_default=True,
    help="For timing each pass.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder for profile.json and the roofline figure profile.png.",
)
def profile(
    width: int,
    batch: int,
    family: str,
    activation: str,
    dtype: str,
    solver: str,
    depth: int,
    seconds: float,
    device: str,
    out: Path,
) -> None:
    """Account for one solve and its gradient: FLOPs, bytes, iterations, memory, and shares of what this machine can do;
    beside it feed-forward nets of as many parameters, FLOPs an iteration, and bytes."""
    import torch
    from rich.console import Console

    import deq

    from .bench.record import environment

    where = _device(device)
    try:
        W, c = families.draw(family, width, batch, torch.Generator().manual_seed(0))
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--family'") from error
    W, c = (t.to(where, getattr(torch, dtype)).requires_grad_() for t in (W, c))
    need_folder(out)
    console = Console()
    with console.status("Profiling"):
        try:
            report = deq.profile(
                deq.solve, W, c, activation, solver=solver, on_failure="ignore", feed_forward=depth, seconds=seconds
            )
        except ValueError as error:  # a solver that cannot serve this activation or weight
            raise click.UsageError(f"{error}.") from error
    path = out / "profile.json"
    try:
        replace_text(path, json.dumps(report.as_dict() | environment(), indent=1) + "\n")
        report.draw(path.with_suffix(".png"))
    except OSError as error:
        console.print(report)
        raise cannot_write(out, error) from error
    console.print(report)
    try:  # outside of what was timed
        deq.solve(W.detach(), c.detach(), activation, solver=solver, on_failure="raise").status  # noqa: B018
    except deq.ConvergenceError as error:
        console.print(str(error).partition(" Their best")[0], style="bold", markup=False, highlight=False)
    console.print(f"Written to {path} and {path.with_suffix('.png')}", soft_wrap=True, markup=False)


def _names(experiment: str | None, known: list[str]) -> list[str]:
    if experiment is None:
        raise click.UsageError(f"name an experiment: {', '.join(known)} or all. `deq run --list` describes them.")
    if experiment == "all":
        return known
    if experiment in known:
        return [experiment]
    close = difflib.get_close_matches(experiment, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise click.BadParameter(
        f"there is no experiment {experiment!r}. {hint}Known: {', '.join(known)}, all.", param_hint="EXPERIMENT"
    )


def _device(text: str) -> str:
    """The device with its index, checked to be here."""
    import torch

    kind, _, index = str(text).partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isascii() and index.isdigit())):
        raise click.BadParameter(f"must be cpu, cuda or cuda:N; got {text!r}.", param_hint="'--device'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA GPU here; `deq info` says why.", param_hint="'--device'")
    if index and int(index) >= torch.cuda.device_count():
        raise click.BadParameter(
            f"there is no {text}: torch sees {torch.cuda.device_count()} GPU(s).", param_hint="'--device'"
        )
    return text


main.add_command(bench)

if __name__ == "__main__":
    main()
