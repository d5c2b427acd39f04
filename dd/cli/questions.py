"""The questions of a guided start on a terminal, or its options: lists of words. Imports no other
module of ours."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Ask: TypeAlias = Callable[[str], str]
Check: TypeAlias = Callable[[Any], object]  # raises ValueError or OSError for invalid input

CONDITIONS = {
    "place": "where the objects are (in a warehouse, in a yard)",
    "lighting": "the light (bright daylight, neon light)",
    "view": "the camera (seen from above, a close-up)",
    "background": "what is behind (shelves in the background, a brick wall behind)",
}


def pair(option: str, text: str) -> tuple[str, list[str]]:
    """("pallet", ["skid", "euro pallet"]) of "pallet=skid,euro pallet"; words may be missing."""
    name, equals, words = text.partition("=")
    if equals and not words.strip():
        raise ValueError(
            f"{option} {text!r}: nothing follows the =; expected NAME=WORD,WORD or NAME alone"
        )
    return name.strip(), [w.strip() for w in words.split(",")] if equals else []


def pairs(option: str, texts: list[str]) -> dict[str, list[str]]:
    """Several of :func:`pair`. ValueError for a name that is given twice."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, words = pair(option, text)
        if name in found:
            raise ValueError(
                f"{option} {name!r} is given twice; give all its words at once: NAME=WORD,WORD"
            )
        found[name] = words
    return found


def fits(check: Check, value: Any) -> bool:
    """Whether ``check(value)`` raises nothing; if it does, the message is shown."""
    try:
        check(value)
    except (ValueError, OSError) as error:
        print(f"  {error}")
        return False
    return True


def ask_name(name: str, check: Check, ask: Ask = input) -> str:
    """``name``, or another one; asks until ``check`` accepts it."""
    while not fits(check, name):
        name = ask("another name: ").strip()
    return name


def ask_classes(check: Check = lambda _: None, ask: Ask = input) -> dict[str, list[str]]:
    """Class names with their synonyms, until an empty line. A class that ``check`` rejects beside
    the earlier ones is asked for again."""
    found: dict[str, list[str]] = {}
    while name := ask(f"class {len(found) + 1} (a singular noun; empty = no more): ").strip():
        if name in found:
            print(f"  {name!r} is there already")
        elif fits(check, {**found, name: []}):
            words = _words(ask(f"  other words for {name}, with commas between (empty = none): "))
            while not fits(check, {**found, name: words}):
                words = _words(ask(f"  other words for {name} (empty = none): "))
            found[name] = words
    return found


def ask_conditions(check: Check = lambda _: None, ask: Ask = input) -> dict[str, list[str]]:
    """Phrases about the site, without empty answers."""
    found: dict[str, list[str]] = {}
    for key, what in CONDITIONS.items():
        question = f"{what}, with commas between (empty = leave out): "
        while (words := _words(ask(question))) and not fits(check, {key: words}):
            pass
        found |= {key: words} if words else {}
    return found


def ask_folder(what: str, check: Check = lambda _: None, ask: Ask = input) -> str | None:
    """An existing folder (``~`` is the home) that ``check`` accepts, or None. Asks again until
    then; earlier answers are kept."""
    while answer := ask(f"{what} (empty = none): ").strip():
        folder = Path(dragged(answer)).expanduser()
        if not folder.is_dir():
            print(f"  there is no folder {folder}")
        elif fits(check, str(folder)):
            return str(folder)
    return None


def dragged(answer: str) -> str:
    """A path without the characters that terminals add when it is dragged into them: quotes, or a
    backslash before a blank."""
    if len(answer) > 1 and answer[0] == answer[-1] and answer[0] in "'\"":
        return answer[1:-1]
    return re.sub(r"\\([ '\"()&])", r"\1", answer)


def ask_choice(what: str, choices: dict[str, str], default: str, ask: Ask = input) -> str:
    """One of ``choices`` {name: what it is}; an empty answer is the default."""
    for name, text in choices.items():
        print(f"  {name}: {text}")
    while (answer := ask(f"{what} (empty = {default}): ").strip() or default) not in choices:
        print(f"  {answer!r} is none of {', '.join(choices)}")
    return answer


def agreed(ask: Ask = input) -> bool:
    answers = {"yes": True, "y": True, "no": False, "n": False}
    while (answer := ask("write this? (yes or no) ").strip().casefold()) not in answers:
        pass
    return answers[answer]


def _words(answer: str) -> list[str]:
    return [word.strip() for word in answer.split(",") if word.strip()]
