"""A page of many pictures that lie beside it: what people open first in a folder of images."""

from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dd.report.explore import Legend
from dd.store.provenance import write_atomic

NAME = "index.html"


def write_contact_sheet(
    folder: str | Path, title: str, note: str, pictures: list[tuple[str, str]], legend: Legend
) -> Path:
    """``index.html`` in ``folder``: ``pictures`` of (label, path below the folder), shown as
    they are needed; ``legend`` of (name, "#rrggbb") as :func:`dd.report.pictures.legend` gives
    it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    shown = [(label, quote(path)) for label, path in pictures]
    page = environment.get_template("contact_sheet.html.j2").render(
        title=title, note=note, pictures=shown, legend=legend
    )
    path = Path(folder) / NAME
    write_atomic(path, page)
    return path
