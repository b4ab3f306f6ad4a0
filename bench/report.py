"""Tables of measurements, 80 columns wide; a figure is followed by (what it must be), and by ! if it is not."""

from rich.table import Table


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
    table = _table(f"Peak beyond the inputs in buffers of B x m (at most), m = {m[1:]}, B = {B[1:]}")
    table.add_column("")
    for which in passes:
        table.add_column(which, justify="right", no_wrap=True)
    by_name: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["pass"]] = row
    for name, found in by_name.items():
        table.add_row(name, *(_cell(found[which], "buffers") for which in passes))
    return table


def summary(rows: list[dict]) -> str:
    """How many of the required figures were reached, and which were not."""
    required = [row for row in rows if row["reached"] is not None]
    missed = [f"{row['variant']} at {row['case']}" for row in required if not row["reached"]]
    text = f"{len(required) - len(missed)} of {len(required)} required figures reached"
    return f"{text}; not: {', '.join(missed)}." if missed else text + "."


def _table(title: str) -> Table:
    return Table(title=title, min_width=len(title), box=None, pad_edge=False, collapse_padding=True)


def _cell(row: dict, field: str) -> str:
    if row["reached"] is None:
        return f"{row[field]:.2f}"
    colour, mark = ("green", " ") if row["reached"] else ("red", "!")
    return f"[{colour}]{row[field]:.2f}[/] ({row['must']:g}){mark}"
