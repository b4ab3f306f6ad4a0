"""How results are written: in one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CannotWrite(OSError):
    """A result could not be written. Every other OSError is of what was computed."""


@contextmanager
def writing() -> Iterator[None]:
    """What fails inside for the system's reasons, a full disk say, is a CannotWrite."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(*error.args) from error


@writing()
def replace_text(path: Path, text: str) -> Path:
    """Make ``text`` the whole of the file at ``path``, and return that: an interruption leaves the old file or the new
    one, and of processes that write the same file the last one's stays."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
