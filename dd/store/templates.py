"""Text files written for people, as Jinja templates beside the module that fills them in."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def fill(template: Path, /, **values: object) -> str:
    """The text of a template; ``{{ x | json }}`` is a JSON value (non-ASCII letters are kept).
    jinja2.UndefinedError for a name that the template uses and ``values`` lacks."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(template.name).render(values)
