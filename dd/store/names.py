"""One rule for every name of a folder or a file: it stays inside its parent folder, and people can
read it. No torch."""

# Characters of a name, and bytes of a part: file systems allow 255, and endings are added.
LONGEST = 200


def folder_name(value: object, key: str, parts: bool = False) -> str:
    """``value``, if it may name a folder: printable parts that do not begin with a dot and hold no
    backslash, at most 200 characters together. One part, or with ``parts`` several with ``/``
    between them. ValueError names ``key``."""
    if isinstance(value, str) and len(value) <= LONGEST:
        each = value.split("/")
        if all(map(_plain, each)) and (parts or len(each) == 1):
            return value
    form = "one or more parts with / between them, each" if parts else "without /,"
    raise ValueError(
        f"{key}={value!r:.80}: expected the name of a folder: {form} of printable characters, "
        f"not beginning with a dot, at most {LONGEST} in all"
    )


def is_text(value: str) -> bool:
    """Whether files, prompts and records can hold a text: no NUL, and no unpaired
    surrogate."""
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def _plain(part: str) -> bool:
    return (
        bool(part.strip())
        and part.isprintable()
        and part[0] != "."
        and "\\" not in part
        and len(part.encode("utf-8", "replace")) <= LONGEST
    )
