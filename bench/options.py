"""Options that several commands have, and the refusal of a folder that cannot be written to."""

import math
import re
import tempfile
from pathlib import Path

import click

LARGEST = 2**63 - 1  # size of a tensor
COUNT = click.IntRange(1, 1024)  # of threads: more than the system lets a process have end it in OpenMP


class Seconds(click.FloatRange):
    """Of a measurement: one of infinitely many has no end, inside of a kernel where Ctrl-C does not reach it."""

    def __init__(self):
        super().__init__(min=0, min_open=True)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is no finite number.", param, ctx)
        return seconds


class ShapeType(click.ParamType):
    """``M,B``: width and batch."""

    name = "M,B"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"\s*([0-9]{1,19})\s*,\s*([0-9]{1,19})\s*", str(value))
        sizes = tuple(map(int, found.groups())) if found else ()
        if not sizes or min(sizes) < 1 or max(sizes) > LARGEST:
            self.fail(f"{value!r} is not a width and a batch such as 256,64, each at most {LARGEST}.", param, ctx)
        return sizes


shapes_option = click.option(
    "--case", "shapes", type=ShapeType(), multiple=True, help="Only cases of this shape; repeatable."
)
out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench/results"),
    show_default=True,
    help="Folder for the JSON result; a folder named after the device is made in it.",
)


def _family(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from .families import split

    try:
        for value in values:
            split(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", ctx, param) from error
    return values


families_option = click.option(
    "--family", "families", multiple=True, callback=_family, help="Only these problems; repeatable."
)
pass_option = click.option(
    "--pass", "which", type=click.Choice(["forward", "training"]), help="One pass instead of both."
)
threads_option = click.option("--threads", type=COUNT, multiple=True, help="Repeatable; 1 and 2 if not given.")


def save(rows: list[dict], out: Path, name: str, device: str = "cpu") -> Path:
    from .record import write

    try:
        return write(rows, out, name, device)
    except OSError as error:
        raise cannot_write(out, error) from error


def cannot_write(out: Path, error: OSError) -> click.BadParameter:
    return click.BadParameter(f"cannot write to {out}: {error.strerror or error}.", param_hint="'--out'")


def need_folder(out: Path) -> None:
    """Makes the folder, and sees that files can be written there before anything is computed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise cannot_write(out, error) from error
