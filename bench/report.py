"""Tables of measurements, 80 columns wide; a figure is followed by (what it must be), and by ! if it is not."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from .compare import Verdict
    from .run import Results


def tables(results: "Results") -> Iterator[Table]:
    """All that a run has measured so far."""
    if results.plain:
        yield times(results.plain)
    for which in dict.fromkeys(row["pass"] for row in results.auto):
        measured = [row for row in results.auto if row["pass"] == which]
        most = max(row["threads"] for row in measured)
        yield choices([row for row in measured if row["threads"] == most])
    for kind, table in (("goals", goals), ("scaling", scaling), ("kernel", kernels)):
        if rows := getattr(results, kind):
            yield table(rows)


def times(rows: list[dict]) -> Table:
    """One line a case and thread count."""
    table = _table("Forward + backward: time of the baseline / time of deq (must)")
    for heading in ("m", "B", "thr", "deq ms", "loop", "torchdeq", "GEMM only", "its", "error", "loop's"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault((row["case"], row["threads"]), {})[row["baseline"]] = row
    for (case, threads), found in by_case.items():
        family, m, B, dtype, *new = case.split("-")
        mark = {"gaussian": "", "orthogonal": "o"}[family] + {"float32": "", "float64": "d"}[dtype] + "n" * len(new)
        table.add_row(
            m[1:] + mark,
            B[1:],
            str(threads),
            f"{1e3 * found['deq']['median']:.3g}",
            *(_cell(found[name], "ratio") if name in found else "-" for name in ("loop", "torchdeq", "gemm")),
            str(found["deq"]["iterations"]),
            f"{found['deq']['error']:.0e}",
            f"{found['loop']['error']:.0e}",
        )
    table.caption = "o: orthogonal W. d: float64. n: W changed before every call. its, error: worst."
    return table


def peers(rows: list[dict]) -> Table:
    """One line a block, method and thread count."""
    table = _table("Any function, forward + backward: time of torchdeq / time of ours (must)")
    for heading in ("block", "method", "thr", "deq ms", "deq", "drop-in", "share", "its", "residual"):
        table.add_column(heading, justify="left" if heading in ("block", "method") else "right", no_wrap=True)
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault((row["case"], row["method"], row["threads"]), {})[row["variant"]] = row
    for (case, method, threads), found in by_case.items():
        table.add_row(
            case,
            method,
            str(threads),
            f"{1e3 * found['deq']['median']:.3g}",
            _cell(found["deq"], "lead"),
            _cell(found["deq.torchdeq"], "lead"),
            f"{found['deq']['block_share']:.2f}",
            f"{found['deq']['forward']}+{found['deq']['backward']}",
            f"{found['deq']['residual']:.0e}",
        )
    table.caption = (
        "drop-in: deq.torchdeq. share: of the block's own evaluations and products in torchdeq's time. "
        "its: forward + backward."
    )
    return table


def choices(rows: list[dict]) -> Table:
    """One line a case, of one pass and thread count."""
    threads = f"{rows[0]['threads']} thread{'s' * (rows[0]['threads'] > 1)}"
    table = _table(f"What deq chooses, {rows[0]['pass']}, {threads}: time of the baseline / time of deq")
    table.add_column("", no_wrap=True)
    headings = ("deq ms", "loop", "torchdeq", "GEMM", "loop=", "tdeq=", "its", "max", "error", "failed")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    by_case: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["baseline"]] = row
    last = None
    for case, found in by_case.items():
        family, m, B, *_ = case.split("-")
        if family != last:
            table.add_row(f"[bold]{family}[/]", *[""] * len(headings))
        last, deq = family, found["deq"]
        table.add_row(
            f" {m[1:]}x{B[1:]}",
            f"{1e3 * deq['median']:.3g}",
            *(_ratio(found.get(name), "ratio") for name in ("loop", "torchdeq", "gemm")),
            *(_ratio(found.get(name), "matched_ratio") for name in ("loop", "torchdeq")),
            f"{deq['mean_iterations']:.0f}",
            str(deq["iterations"]),
            _number(deq["error"], ".0e"),
            f"{100 * deq['failed']:.0f}%" if deq["failed"] else "0",
        )
    table.caption = "torchdeq: its fastest solver. =: at the same error. -: solves not all. !: too low."
    return table


def gpu_tables(results: "Results") -> Iterator[Table]:
    """All that a run on a GPU has measured so far."""
    for which in dict.fromkeys(row["pass"] for row in results.auto):
        yield gpu([row for row in results.auto if row["pass"] == which])
    if results.goals:
        yield goals(results.goals, "samples not solved: at most. torchdeq: its fastest solver.")


def gpu(rows: list[dict]) -> Table:
    """One line a case, of one pass."""
    table = _table(f"Whole solves, {rows[0]['pass']}: time of the baseline / time of deq")
    table.add_column("", no_wrap=True)
    for heading in ("deq us", "dev", "graph", "dev", "loop", "comp", "tdeq", "its", "error", "graph's", "%"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_case: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["baseline"]] = row
    for case, found in by_case.items():
        family, m, B, *_ = case.split("-")
        deq, graphed = found["deq"], found["graphed"]
        table.add_row(
            f"{m[1:]}x{B[1:]}" + (f" {family}" if family != "gaussian" else ""),
            f"{1e6 * deq['median']:.0f}",
            _number(deq["device_median"] and 1e6 * deq["device_median"], ".0f"),
            _ratio(graphed, "ratio"),
            _number(graphed["device_ratio"], ".1f"),
            *(_ratio(found.get(name), "ratio") for name in ("loop", "compiled", "torchdeq")),
            f"{deq['mean_iterations']:.0f}" + ("[red]![/]" if deq["failed"] else ""),
            _number(deq["error"], ".0e"),
            _number(graphed["error"], ".0e"),
            _number(deq["roofline_share"] and 100 * deq["roofline_share"], ".0f"),
        )
    table.caption = "dev: the device alone. tdeq: fastest solver. %: of the roofline."
    return table


def constants(name: str, numbers: dict[str, dict], failed: dict[str, str]) -> Table:
    """One line a number."""
    table = _table(f"Constants of the {name}")
    for heading in ("", "value", "unit", ""):
        table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=True)
    for key, number in numbers.items():
        value = "none" if number["value"] is None else f"{number['value']:.4g}"
        state = f"failed: {failed[key]}" if key in failed else number["basis"]
        table.add_row(key, value, number["unit"], state[:30])
    return table


def goals(rows: list[dict], caption: str = "Last two: at most. Trained: at the same error.") -> Table:
    """One line a goal; a column a pass and thread count, with the worst case's figure."""
    columns = list(dict.fromkeys((row["pass"], row["threads"]) for row in rows))
    table = _table("Worst case of each group (must)")
    table.add_column("", no_wrap=True)
    for which, threads in columns:
        table.add_column(f"{which} {threads}", justify="right", no_wrap=True)
    by_name: dict[str, dict[tuple, dict]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["pass"], row["threads"]] = row
    for name, found in by_name.items():
        cells = (found.get(column) for column in columns)
        table.add_row(
            name, *("-" if row is None else _cell(row, "ratio" if "ratio" in row else "value") for row in cells)
        )
    table.caption = caption
    return table


def scaling(rows: list[dict]) -> Table:
    """One line a case, a column a pass."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    table = _table("deq with one thread / with two, best times (must)")
    table.add_column("", no_wrap=True)
    for which in passes:
        table.add_column(which, justify="right", no_wrap=True)
    by_case: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["pass"]] = row
    for case, found in by_case.items():
        family, m, B, _ = case.split("-")
        table.add_row(f"{family} {m[1:]}x{B[1:]}", *(_cell(found[which], "ratio") for which in passes))
    return table


def kernels(rows: list[dict]) -> Table:
    """One line a shape."""
    table = _table("Micro-kernel on one core: share of the multiply-add peak (must)")
    for heading in ("m", "B", "GFLOP/s", "peak", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        _, m, B, _ = row["case"].split("-")
        table.add_row(m[1:], B[1:], f"{row['gflops']:.1f}", f"{row['peak']:.1f}", _cell(row, "ratio"))
    return table


def memory(rows: list[dict]) -> Table:
    """One line a competitor, a column a pass."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    _, m, B, _ = rows[0]["case"].split("-")
    table = _table(f"Peak beyond the inputs in buffers of B x m (at most), m = {m[1:]}, B = {B[1:]}", "", *passes)
    by_name: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["pass"]] = row
    for name, found in by_name.items():
        table.add_row(name, *(_cell(found[which], "buffers") if which in found else "-" for which in passes))
    return table


def digits(rows: list[dict]) -> Table:
    """One line a competitor."""
    table = _table(
        f"Training a classifier of handwritten digits, {rows[0]['epochs']} epochs",
        "",
        "seconds",
        "over deq's",
        "test accuracy",
        "its",
        "failed solves",
    )
    for row in rows:
        iterations = sum(row["mean_iterations"]) / len(row["mean_iterations"])
        table.add_row(
            row["variant"],
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.1f}",
            f"{100 * row['accuracy']:.1f}%",
            f"{iterations:.0f}",
            f"{100 * row['failed']:.3g}%" + ("[red]![/]" if row["reached"] is False else ""),
        )
    return table


def seeds(rows: list[dict]) -> Table:
    """One line a case: milliseconds of a training step of all seeds, deq's trainer and the loop seed after seed."""
    table = _table("A training step of all seeds, ms", "", "at once", "loop", "ratio", "must", "losses differ by")
    for row in rows:
        ms = (f"{1000 * row[key]:.2f}" for key in ("seconds", "loop_seconds"))
        mark = "" if row["reached"] else "[red]![/]"
        table.add_row(row["case"], *ms, f"{row['ratio']:.1f}{mark}", f"{row['must']:g}", f"{row['difference']:.0e}")
    return table


def steep(rows: list[dict]) -> Table:
    """One line a number of threads: seconds of a training step, of its products alone, and their ratio."""
    table = _table(
        "Forward + backward of a training step of steep, s",
        "",
        "step",
        "products",
        "evaluations",
        "step / products",
        "at most",
    )
    for row in rows:
        seconds = (f"{row[key]:.2f}" for key in ("seconds", "gemm_seconds"))
        mark = "" if row["reached"] else "[red]![/]"
        table.add_row(row["case"], *seconds, str(row["evaluations"]), f"{row['ratio']:.2f}{mark}", f"{row['most']:g}")
    return table


def summary(rows: list[dict]) -> str:
    """How many of the required figures were reached, and which were not."""
    required = [row for row in rows if row["reached"] is not None]
    missed = [f"{row['variant']} at {row['case']}" for row in required if not row["reached"]]
    text = f"{len(required) - len(missed)} of {len(required)} required figures reached"
    return f"{text}; not: {', '.join(dict.fromkeys(missed))}." if missed else text + "."


def _table(title: str, *headings: str) -> Table:
    """The first column names a row, the others hold numbers; without headings the caller adds the columns."""
    table = Table(title=title, min_width=len(title), box=None, pad_edge=False, collapse_padding=True)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _cell(row: dict, field: str) -> str:
    if row["reached"] is None:
        return f"{row[field]:.2f}"
    colour, mark = ("green", " ") if row["reached"] else ("red", "!")
    return f"[{colour}]{row[field]:.2f}[/] ({row['must']:g}){mark}"


def _ratio(row: dict | None, field: str) -> str:
    if row is None or row[field] is None:
        return "-"
    missed = field == "ratio" and row["reached"] is False
    return f"{row[field]:.1f}" + ("[red]![/]" if missed else " ")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def verdicts(verdicts: Sequence["Verdict"]) -> Table:
    """One line a job of bench/compare.py."""
    table = _table("Time of HEAD / time of BASE, one thread (at most)")
    table.add_column("case", no_wrap=True)
    for heading in ("BASE", "HEAD", "HEAD / BASE", "spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for v in verdicts:
        mark = "!" if v.fails else ""
        cells = f"{1e3 * v.base:.3g} ms", f"{1e3 * v.head:.3g} ms", f"{v.ratio:.3f} ({v.limit:.2f}){mark}"
        table.add_row(v.job.name, *cells, f"{v.spread:.1%}")
    return table
