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
        console.print(_rich(table))
    for note in _notes(result):
        console.print(Padding(Text(note), (0, 0, 0, 2)))
    console.print(f"Verdict: {result.verdict}.", style="bold", highlight=False)


def _rich(table: Table) -> RichTable:
    rich = RichTable(
        title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0)
    )
    numeric = {i for i in range(len(table.columns)) if all(_is_number(row[i]) for row in table.rows)}
    for i, column in enumerate(table.columns):
        most = 16 if column == "verdict" else None  # the longest verdict takes two lines, not the room of the claims
        rich.add_column(Text(column), justify="right" if i in numeric else "left", overflow="fold", max_width=most)
    for row in table.rows:
        rich.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return rich


def _is_number(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell[0] in "-<>=~")


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
