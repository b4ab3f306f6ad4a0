"""The ledger of claims: every claim of every experiment on one page, as self-contained HTML and as Markdown."""

import base64
import json
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import jinja2

from ..files import replace_text
from ._equilibria import MOVED
from ._judge import RESIDUAL, SEEDS
from ._result import CONFOUNDED, NOT_JUDGED, NOT_REPRODUCED, PROVED, VIOLATED, number
from ._run import SCHEMA

HTML, MARKDOWN = "index.html", "README.md"
_CLASSES = {PROVED: "good", VIOLATED: "bad", NOT_REPRODUCED: "no", CONFOUNDED: "no", NOT_JUDGED: "dim"}
_RULES = (
    "A row with a trained DEQ reports the largest residual of its fixed points over all seeds and a few hundred test "
    "points, and its metric there, solved again with ten times the steps. Where a residual is above "
    f"{number(RESIDUAL)} or the metric moves by more than {number(MOVED)} of itself, the row is about a weight-tied "
    f"net of finite depth and says so. Statistical rows are judged over at least {SEEDS} seeds, by the ratio of "
    "medians (quartiles over seeds in brackets) and a sign test."
)


def write_ledger(out: Path, names: Iterable[str]) -> list[Path]:
    """Write HTML and MARKDOWN into ``out`` from the records there, in the order of ``names``; those without are left
    out, and what is no record with a figure, or was written by another version of deq in another form."""
    records = [record for record in (_read(out, name) for name in names) if record is not None]
    context = {"records": records, "counts": _counts(records), "rules": _RULES, "time": _time(records)}
    written = []
    for target, template in ((HTML, "ledger.html"), (MARKDOWN, "ledger.md")):
        text = resources.files(__package__).joinpath("templates", template).read_text(encoding="utf-8")
        page = _environment(out, escape=target == HTML).from_string(text)
        written.append(replace_text(out / target, page.render(context)))
    return written


def _read(out: Path, name: str) -> dict | None:
    try:
        record = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(record, dict) and (record.get("schema"), record.get("experiment")) == (SCHEMA, name)
    return record if fits and (out / f"{name}.png").is_file() else None


def _environment(out: Path, escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=escape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "number": lambda v: "not finite" if v is None else number(v, 4),
        "short": number,
        "kind": lambda verdict: _CLASSES.get(verdict, "good"),
        "cell": lambda text: str(text).replace("|", "\\|"),
        "bound": lambda c: f"{c['relation']} {number(c['required'])}",
        "spread": lambda c: "" if c["low"] is None else f" [{number(c['low'])}, {number(c['high'])}]",
        "settings": _settings,
        "picture": lambda name: base64.b64encode((out / f"{name}.png").read_bytes()).decode(),
    }
    return environment


def _counts(records: list[dict]) -> dict[str, int]:
    """Verdict -> number of claims, most frequent first."""
    return dict(Counter(c["verdict"] for r in records for c in r["claims"]).most_common())


def _time(records: list[dict]) -> str:
    """How long all of it took, where, and of which commits, in a sentence."""
    origins = [r["provenance"] for r in records]
    commits = sorted({f"{(p['commit'] or 'none')[:8]}{' modified' if p['modified'] else ''}" for p in origins})
    threads = max((p["threads"] for p in origins), default=1)
    minutes = number(sum(p["seconds"] for p in origins) / 60)
    where = ", ".join(sorted({f"{p['platform']}, {p['device']}, {p['isa']}" for p in origins}))
    return f"All of it took {minutes} minutes on {where}, {threads} thread(s) at most; commit {', '.join(commits)}."


def _settings(record: dict) -> str:
    s = record["settings"]
    depth = f", depth {s['depth']}" if s["depth"] else ""
    several = f", {s['seeds']} seeds" if s["seeds"] > 1 else ""
    return f"{s['level']} run: width {s['width']}{depth}{several}, seed {s['seed']}, {s['device']}"
