"""What a guided start asks on a terminal, or takes as options: lists of words. No other module of ours."""

from pathlib import Path

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
        raise ValueError(f"{option} {text!r}: nothing stands behind the =; expected NAME=WORD,WORD or NAME alone")
    return name.strip(), [w.strip() for w in words.split(",")] if equals else []


def pairs(option: str, texts: list[str]) -> dict[str, list[str]]:
    """Several of :func:`pair`. ValueError for a name that is given twice."""
    found = {}
    for text in texts:
        name, words = pair(option, text)
        if name in found:
            raise ValueError(f"{option} {name!r} is given twice; give all its words at once: NAME=WORD,WORD")
        found[name] = words
    return found


def ask_classes(ask=input) -> dict[str, list[str]]:
    """Class names with their synonyms, until an empty line."""
    found = {}
    while name := ask(f"class {len(found) + 1} (a singular noun; empty = no more): ").strip():
        if name in found:
            print(f"  {name!r} is there already")
            continue
        found[name] = _words(ask(f"  other words for {name}, with commas between (empty = none): "))
    return found


def ask_conditions(ask=input) -> dict[str, list[str]]:
    """Phrases about the site, those of empty answers left out."""
    answers = {key: _words(ask(f"{what}, with commas between (empty = leave out): ")) for key, what in CONDITIONS.items()}
    return {key: words for key, words in answers.items() if words}


def ask_folder(what: str, ask=input) -> str | None:
    """A folder that is there (``~`` is the home), or None; asked again until it is: the answers before it are kept."""
    while answer := ask(f"{what} (empty = none): ").strip():
        folder = Path(answer).expanduser()
        if folder.is_dir():
            return str(folder)
        print(f"  there is no folder {folder}")
    return None


def _words(answer: str) -> list[str]:
    return [word.strip() for word in answer.split(",") if word.strip()]
