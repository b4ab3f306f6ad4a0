"""A recording as text: what ran when, inside what, for how long. For machines without Nsight Systems."""

from collections import Counter
from collections.abc import Iterator

from .ranges import Event, Recorder

BAR, NAMES = 22, 34
FOLDED = ("step", "anchor", "Anderson")  # hundreds in a solve: neighbours become a line
GAP = 50  # neighbours are not apart by more than such a part of the whole


def timeline(recorder: Recorder) -> str:
    """One line a range, indented below the range that it lies in, at most 80 columns; threads one after the other.

    Steps, anchors and Anderson's mixtures that follow each other are one line with their numbers and total time. The
    bar shows when, from the first start to the last end of the recording.
    """
    if not isinstance(recorder, Recorder):
        kind = type(recorder).__name__
        raise TypeError(f"recorder must be what `with record() as recorder:` gives; got {kind}")
    if not recorder.events:
        return "nothing was recorded"
    first = min(e.start for e in recorder.events)
    whole = max(max(e.end for e in recorder.events) - first, 1)
    lines = [f"{'ms':>9} {'range':<{NAMES}} {'took':>9}  |{_milli(whole):^{BAR}}|"]
    for thread in dict.fromkeys(e.thread for e in sorted(recorder.events, key=lambda e: e.start)):
        lines.append(f"thread {thread}")
        events = sorted((e for e in recorder.events if e.thread == thread), key=lambda e: (e.start, -e.end))
        lines += [_line(depth, group, first, whole) for depth, group in _folded(_nested(events), whole // GAP)]
    return "\n".join(lines)


def _nested(events: list[Event]) -> Iterator[tuple[int, Event]]:
    """Every event with the number of events that it lies in."""
    around: list[Event] = []
    for event in events:
        while around and around[-1].end <= event.start:
            around.pop()
        yield len(around), event
        around.append(event)


def _folded(nested: Iterator[tuple[int, Event]], gap: int) -> Iterator[tuple[int, list[Event]]]:
    """Neighbours of one depth in the compiled library, apart by at most ``gap``, in one group; others alone."""
    depth, group = 0, []
    for here, event in nested:
        belongs = group and here == depth and event.name in FOLDED and event.start - group[-1].end <= gap
        if group and not belongs:
            yield depth, group
            group = []
        depth = here
        group.append(event)
        if event.name not in FOLDED:
            yield depth, group
            group = []
    if group:
        yield depth, group


def _line(depth: int, group: list[Event], first: int, whole: int) -> str:
    start, end, event = group[0].start, group[-1].end, group[0]
    name = event.name
    if len(group) > 1:
        name = ", ".join(f"{kind} x {n}" for kind, n in Counter(e.name for e in group).items())
    elif event.shape is not None and len(event.shape) > 1:
        name += f" {event.shape[-2]} x {event.shape[-1]}"
        if event.iterations is not None and event.iterations.numel():
            name += f", {int(event.iterations.max())} iterations"
    elif event.payload is not None:
        name += f" {event.payload}"
    left = BAR * (start - first) // whole
    filled = max(1, round(BAR * (end - start) / whole))
    bar = (" " * left + "#" * filled)[:BAR]
    took = sum(e.end - e.start for e in group)
    return f"{(start - first) / 1e6:9.3f} {'  ' * depth + name:<{NAMES}.{NAMES}} {_milli(took):>9}  |{bar:<{BAR}}|"


def _milli(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f}"
