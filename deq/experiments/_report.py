"""The short report of a result: the same tables in the terminal and as Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from ._result import NOT_JUDGED, PROVED, REPRODUCED, VIOLATED, Claim, Result, Table, number

if TYPE_CHECKING:
    from ._run import Experiment, Settings

_STYLES = {PROVED: "green", REPRODUCED: "green", VIOLATED: "bold red", NOT_JUDGED: "dim"}


def claims_table(claims: Sequence[Claim]) -> Table:
    """Every claim with its measured value, bound and verdict."""
    rows = [
        (c.statement, number(c.measured, 4), f"{c.relation} {number(c.required)}", c.source, c.verdict) for c in claims
    ]
    return Table("Claims", ("claim", "measured", "required", "source", "verdict"), rows)


def _notes(result: Result) -> list[str]:
    """The conditions of every verdict that is no proof, then the experiment's own notes."""
    conditions = [
        f"{c.statement}: {c.verdict}; {c.note}."
        for c in result.claims
        if c.verdict not in (PROVED, NOT_JUDGED) and c.note
    ]
    return [*conditions, *result.notes]


def print_result(console: Console, result: Result) -> None:
    """Print tables, notes and the verdict."""
    for table in (*result.tables, claims_table(result.claims)):
        console.print(_rich(table, console.width))
    for note in _notes(result):
        console.print(Padding(Text(note), (0, 0, 0, 2)))
    console.print(f"Verdict: {result.verdict}.", style="bold", highlight=False)


def _rich(table: Table, width: int) -> RichTable:
    rich = RichTable(
        title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0)
    )
    columns = [(name, *(row[i] for row in table.rows)) for i, name in enumerate(table.columns)]
    for (name, *cells), wide in zip(columns, _widths(columns, width), strict=True):
        filled = [cell for cell in cells if cell]
        numeric = bool(filled) and all(map(_is_number, filled))
        rich.add_column(Text(name), justify="right" if numeric else "left", overflow="fold", width=wide)
    for row in table.rows:
        rich.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return rich


def _widths(columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """Of the columns, names included, in a table of at most ``width``: those of the longest cells; where that is too
    much the widest gives way first, down to its longest word. Only where words alone are too much are they broken."""
    widths = [max(map(len, column)) for column in columns]
    words = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    for i, (name, *_) in enumerate(columns):
        if name == "verdict":
            widths[i] = min(widths[i], 16)  # the longest takes two lines, not the room of the claims
    room = width - len(columns) - 1  # of what stands between them and on either side
    for least in (words, [1] * len(columns)):
        while sum(widths) > room and (wider := [i for i in range(len(columns)) if widths[i] > least[i]]):
            widths[max(wider, key=widths.__getitem__)] -= 1
    return widths


def _is_number(cell: str) -> bool:
    return cell[0].isdigit() or cell[0] in "-<>=~"


def markdown(experiment: "Experiment", settings: "Settings", result: Result) -> str:
    """The report as Markdown, with the figure beside it."""
    depth = f", depth {settings.depth}" if settings.depth else ""
    options = f"width {settings.width}{depth}, seed {settings.seed}, {settings.seeds} seed(s), {settings.device}"
    lines = [
        f"# {experiment.name}: {experiment.title}",
        "",
        experiment.claim,
        "",
        f"Settings: {options}, {settings.level} run. Raw values, every seed and provenance: `{experiment.name}.json`.",
        "",
        f"![{experiment.title}]({experiment.name}.png)",
        "",
        f"**Verdict: {result.verdict}.**",
    ]
    for table in (*result.tables, claims_table(result.claims)):
        lines += ["", f"## {table.title}", "", _line(table.columns), _line(["---"] * len(table.columns))]
        lines += [_line(row) for row in table.rows]
    lines += ["", *(f"- {note}" for note in _notes(result))]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
