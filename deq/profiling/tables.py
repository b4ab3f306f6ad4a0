"""The text of a report, at most 80 columns."""

import textwrap
from collections import Counter as Tally
from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .report import WIDTH, Pass, Report

BAR, MOST_BINS = 32, 10
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))
BLOCK, ASCII_BLOCK = "█", "#"
_INDENT = ({}, {"initial_indent": "  ", "subsequent_indent": "    "})  # of a plan, and of its reasons


def tables(report: Report, ascii_only: bool = False) -> Iterator[object]:
    """The parts of the text, for rich to print; ``ascii_only`` where the encoding has no block characters."""
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in report.shapes) or "nothing"
    count = report.ceilings.threads
    threads = f", {count} thread{'s' if count != 1 else ''}" if report.device == "cpu" else ""
    yield Text(f"{report.what}: solved {shapes} on {report.device}{threads}", style="bold")
    for plan in report.plans:
        yield Text("\n".join(textwrap.fill(line.strip(), WIDTH, **_INDENT[i > 0]) for i, line in enumerate(plan)))
    yield _passes(report)
    for one in report.passes:
        if one.iterations:
            yield _histogram(one, ASCII_BLOCK if ascii_only else BLOCK)
    yield _memory(report)
    if report.beside:
        yield _beside(report)
    yield _ceilings(report)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _passes(report: Report) -> Table:
    table = _table("\nCost of a call", "", *(one.name for one in report.passes))

    def row(label: str, value) -> None:
        table.add_row(label, *(value(one) for one in report.passes))

    row("time, median (20 to 80 %)", lambda one: _spread(one.seconds))
    row("useful FLOPs", lambda one: si(one.counts.flops, "FLOP"))
    row("executed FLOPs", lambda one: si(one.executed, "FLOP"))
    names = list(dict.fromkeys(name for one in report.passes for name in one.counts.executed))
    for name in names:
        row(f"  of them {name}", lambda one, name=name: si(one.counts.executed[name], "FLOP"))
    for name in dict.fromkeys(name for one in report.passes for name in one.counts.rows):
        row(f"products W z, {name}, a sample", lambda one, name=name: _a_sample(one, one.counts.rows[name]))
    row("bytes moved (model)", lambda one: si(one.counts.bytes, "B"))
    row("useful FLOPs a byte", lambda one: f"{one.intensity:.1f}")
    row("useful rate", lambda one: si(one.rate, "FLOP/s"))
    row("share of arithmetic ceiling", lambda one: f"{one.arithmetic_share(report.ceilings):.0%}")
    where = report.bandwidth_share(report.passes[0])[0]
    row("share of reading ceiling", lambda one: f"{report.bandwidth_share(one)[1]:.0%} of {where}")
    row("operator calls", lambda one: str(sum(one.counts.operators.values())))
    row("results the host waits for", lambda one: str(one.counts.host_reads))
    table.add_row("all passes, W seen first", _seconds(report.first_call))
    return table


def _a_sample(one: Pass, rows: int) -> str:
    return f"{rows / len(one.iterations):.2f}" if one.iterations else str(rows)


def _histogram(one: Pass, block: str) -> Group:
    least, most = min(one.iterations), max(one.iterations)
    size = -(-(most - least + 1) // MOST_BINS)
    bins = Tally((n - least) // size for n in one.iterations)
    highest = max(bins.values())
    mean = sum(one.iterations) / len(one.iterations)
    lines = [Text(f"\nIterations of {len(one.iterations)} samples, {one.name}: mean {mean:.1f}", style="bold")]
    for i in range((most - least) // size + 1):
        low, high = least + i * size, min(least + (i + 1) * size - 1, most)
        label = str(low) if low == high else f"{low} to {high}"
        lines.append(Text(f"{label:>12} {block * round(BAR * bins[i] / highest)} {bins[i]}"))
    return Group(*lines)


def _memory(report: Report) -> Table:
    memory = report.memory
    table = _table("\nMemory beyond the inputs", "", "theory, solves", "tensors", "process", "B x m buffers")
    buffers = [
        f"{n / memory.buffer:.2f}" if memory.buffer else "" for n in (memory.tensors_forward, memory.tensors_both)
    ]
    table.add_row(
        f"peak, {report.passes[0].name}",
        si(memory.model_forward, "B"),
        si(memory.tensors_forward, "B"),
        si(memory.process_forward, "B"),
        buffers[0],
    )
    if len(report.passes) > 1:
        table.add_row(
            "peak, forward + backward",
            si(memory.model_both, "B"),
            si(memory.tensors_both, "B"),
            si(memory.process_both, "B"),
            buffers[1],
        )
    table.add_row(f"retained after {report.passes[0].name}", si(memory.model_retained, "B"), si(memory.retained, "B"))
    table.add_row("kept for later: packed W", "", "", si(memory.packed, "B"))
    return table


def _beside(report: Report) -> Table:
    shape, memory = report.shapes[0], report.memory
    m = shape[-1]
    names = [one.name for one in report.passes]
    table = _table(
        "\nBeside it: feed-forward nets", "equal", "L x width", "params", "FLOPs", "time", "retained", "peak"
    )
    table.add_row(
        "the equilibrium",
        f"1 x {m}",
        si(m * m + m),
        si(sum(one.counts.flops for one in report.passes)),
        _seconds(sum(one.seconds.median for one in report.passes)),
        si(memory.retained, "B"),
        si(memory.tensors_both, "B"),
    )
    for net in report.beside:
        table.add_row(
            net.equal,
            f"{net.depth} x {net.width}",
            si(net.parameters),
            si(_sum(net.flops, names)),
            _seconds(_sum(net.seconds, names)),
            si(net.retained, "B"),
            si(net.peak, "B"),
        )
    return table


def _sum(values: dict, names: list[str]) -> float:
    return sum(values[name] for name in names if name in values)


def _ceilings(report: Report) -> Text:
    found = report.ceilings
    rates = ", ".join(f"{name} {si(rate, 'FLOP/s')}" for name, rate in found.flops.items())
    reads = ", ".join(f"{name} {si(rate, 'B/s')}" for name, rate in found.bandwidth.items())
    return Text(f"\nCeilings measured here: {rates}; reading: {reads}.")


def _spread(seconds) -> str:
    """Both ends in the unit of the median, which alone is named."""
    factor, _ = _prefix(seconds.median)
    low, high = (_three_digits(end / factor) for end in (seconds.p20, seconds.p80))
    return f"{_seconds(seconds.median)} ({low} to {high})"


def _seconds(seconds: float) -> str:
    return si(seconds, "s")


def si(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 GFLOP. Empty for None."""
    if value is None:
        return ""
    factor, prefix = _prefix(value)
    scaled = value / factor
    is_whole = factor == 1.0 and (scaled == int(scaled) or abs(scaled) < 0.5)  # below all prefixes: 0
    text = f"{scaled:.0f}" if is_whole else _three_digits(scaled)
    return f"{text} {prefix}{unit}".rstrip()


def _prefix(value: float) -> tuple[float, str]:
    """The largest prefix that leaves a value of at least 1, with its factor; none for what is smaller than all."""
    return next((pair for pair in PREFIXES if abs(value) >= pair[0] * 0.9995), (1.0, ""))


def _three_digits(scaled: float) -> str:
    return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f}"
