"""What a table of rich looks like in a terminal."""

from rich.console import Console


def render(table) -> str:
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
