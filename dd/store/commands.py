"""Commands as the user types them: a checkout has scripts, an installation has one program."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dd.store.conf import CHECKOUT

SCRIPTS = ("generate", "train", "evaluate")  # in a checkout; commands of PROGRAM
PROGRAM = "dataset-diffusion"
MODULE = "python -m dd"
SCRIPT = re.compile(rf"(?<![\w./-])(?:python )?({'|'.join(SCRIPTS)})\.py\b")

CALLS: list[str] = []  # of Python that is under way


@contextmanager
def called(call: str) -> Iterator[None]:
    """Results within are recorded as made by this call in Python, such as ``dd.train(...)``."""
    CALLS.append(call)
    try:
        yield
    finally:
        CALLS.pop()


def program() -> str:
    """What the user typed before the command: ``dataset-diffusion``, else ``python -m dd``."""
    return PROGRAM if Path(sys.argv[0]).stem == PROGRAM else MODULE


def spelled(text: str) -> str:
    """A text with the commands that it names in the form that works here: of an installation, and
    of who typed ``dataset-diffusion generate``, ``python generate.py`` and ``generate.py`` have
    no meaning."""
    scripts = (CHECKOUT / "generate.py").is_file()
    if scripts and program() == MODULE and not _is_door_of_module():
        return text
    return SCRIPT.sub(rf"{program()} \1", text).replace(MODULE, program())


def same_commands(text: str) -> str:
    """A text with every command in one form, to compare what was written by different ones."""
    words = rf"(?:{PROGRAM}|{MODULE}) ({'|'.join(SCRIPTS)})\b"
    return SCRIPT.sub(r"\1.py", re.sub(words, r"\1.py", text)).replace(PROGRAM, MODULE)


def _is_door_of_module() -> bool:
    return Path(sys.argv[0]).name == "__main__.py" and bool({*sys.argv[1:2]} & {*SCRIPTS})


def typed() -> str:
    """The command of this process, to be typed again in a shell; in Python the call."""
    if CALLS:
        return CALLS[-1]
    first, *rest = sys.argv
    found = f'hydra.searchpath=["file://{Path.cwd() / "conf"}"]'  # by the program, and again
    rest = [a for a in rest if a != found]
    if Path(first).stem == PROGRAM:
        words = [PROGRAM]
    elif Path(first).name == "__main__.py":
        words = MODULE.split()
    else:
        words = ["python", _word(first)] if first.endswith(".py") else [_word(first)]
    return " ".join([*words, *map(_word, rest)])


def _word(argument: str) -> str:
    """An argument as a shell takes it. The quotes of ``name="mine"``, which a command puts there
    itself, are put there again."""
    plain = re.fullmatch(r'[\w.+~@/-]+="[^"\\$`,]*"', argument)
    return argument if plain else shlex.quote(argument)


def repeated(command: str) -> str:
    """The command of a run.json as it is typed; those of the first versions lack their
    ``python``."""
    return f"python {command}" if command.split(" ", 1)[0].endswith(".py") else command
