"""The interface of export formats, and the list of formats."""

from typing import Protocol

from dd.exports import coco, cvat, huggingface, mmseg, webdataset
from dd.exports.source import Source
from dd.exports.target import Target


class Exporter(Protocol):
    """A module that writes a checked data set in the format of another tool.

    ``check`` comes first and writes nothing: ValueError for a set that the format cannot hold, else
    notes for the user. ``write`` asks the target for every file of the export, including existing
    ones, because the target keeps the list. It makes only the missing files, and calls
    :meth:`Target.done` once a sample is written. The bytes depend on the content of the set alone.
    """

    def check(self, source: Source, link: bool) -> list[str]: ...

    def write(self, source: Source, target: Target) -> None: ...


FORMATS: dict[str, Exporter] = {
    "mmseg": mmseg,
    "coco": coco,
    "huggingface": huggingface,
    "webdataset": webdataset,
    "cvat": cvat,
}
