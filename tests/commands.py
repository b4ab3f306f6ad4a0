"""The command ``deq`` as tests call it."""

from click.testing import CliRunner, Result

from deq.cli import main


def deq_command(*arguments: str) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "80", "TERM": "dumb"})
