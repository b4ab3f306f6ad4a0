"""Where a measurement was taken, and the file it goes to."""

import json
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import deq
from deq.files import replace_text, writing


def environment(device: str = "cpu") -> dict[str, object]:
    """Fields that every row of a result file carries: device, commit, versions. device: torch's type of it."""
    versions = {"deq": deq.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        versions |= {"triton": version("triton"), "cuda": torch.version.cuda}
    for package in ("torchdeq", "jaxopt", "optimistix"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"device": device_name(device), "commit": commit(), "versions": versions}


def device_name(device: str = "cpu") -> str:
    """The model name of the CPU or of the current GPU, as the system tells it; of a CPU whose name says no model, as
    under some hypervisors, with the numbers of its family and model: two generations must not share a folder."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    return cpu_name(info.read_text() if info.exists() else "") or platform.processor() or platform.machine()


def cpu_name(info: str) -> str | None:
    """The same from the text of /proc/cpuinfo, None where it tells no name."""
    told = {key: re.search(rf"^{key}\s*:\s*(.+)$", info, re.MULTILINE) for key in ("model name", "cpu family", "model")}
    name, family, model = (found and found.group(1).strip() for found in told.values())
    if name is None or re.search(r"\d", name) or None in (family, model):
        return name
    return f"{name}, family {family}, model {model}"


def commit() -> str | None:
    """Commit of the sources, marked "-dirty" with uncommitted changes; None outside a git checkout."""
    folder = Path(deq.__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent:
            return None  # installed below somebody else's checkout
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def folder(out: Path, device: str = "cpu") -> Path:
    """Where the results of this device go: ``out/<device>``, made if it is not there."""
    path = out / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    with writing():
        path.mkdir(parents=True, exist_ok=True)
    return path


def write(rows: list[dict], out: Path, name: str, device: str = "cpu") -> Path:
    """Write the rows to ``out/<device>/<name>.json`` and return the path."""
    return write_rows(folder(out, device) / f"{name}.json", rows)


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    """Make the rows, one a line, the whole of this file. An interruption leaves the file of before."""
    return replace_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
