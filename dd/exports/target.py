"""The target of an export: each file appears complete, by a rename, and existing files are kept."""

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from dd.exports.source import ExportItem
from dd.store.provenance import whole, write_atomic

SHARD_BYTES = 256 << 20  # of images and masks, before the next tar or parquet file is begun


class Target:
    """The folder of one export. ``link``: make hard links instead of copies; ``advance(1)`` is
    called for each finished sample.

    ``names`` collects the files of the export, in the order of the requests.
    """

    def __init__(
        self,
        root: str | Path,
        link: bool = False,
        advance: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.root, self.link, self._advance = Path(root), link, advance
        self.names: list[str] = []
        self._done: set[str] = set()

    def done(self, item: ExportItem) -> None:
        """A sample is written; counted once, even if it is in several splits."""
        if item.id not in self._done:
            self._done.add(item.id)
            self._advance(1)

    def missing(self, name: str) -> bool:
        """Whether the file has to be made; it belongs to the export in any case."""
        self.names.append(name)
        return not (self.root / name).is_file()

    def write(self, name: str, make: Callable[[], bytes | str | Iterable[str]]) -> None:
        """Write the file with the content that ``make`` returns; ``make`` is called only if the
        file is missing."""
        if self.missing(name):
            write_atomic(self.root / name, make())

    def place(self, source: Path, name: str) -> None:
        """Add the file ``source`` under another name; ValueError if a link cannot be made."""
        if not self.missing(name):
            return
        path = self.root / name
        if not self.link:
            return write_atomic(path, source.read_bytes())
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), path)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            raise ValueError(
                f"{source} cannot be linked into {self.root} ({error.strerror}): hard links need "
                "one file system that supports them. Use --copy"
            ) from None

    def whole(self, name: str) -> AbstractContextManager[Path]:
        """A temporary path to write the file ``name`` to (:func:`dd.store.provenance.whole`)."""
        return whole(self.root / name)


def shards(items: Iterable[ExportItem]) -> list[list[ExportItem]]:
    """Items in order, in parts whose images and masks have at most :data:`SHARD_BYTES`, or a single
    item."""
    parts: list[list[ExportItem]] = []
    free = 0
    for item in items:
        size = item.image.stat().st_size + item.mask.stat().st_size
        if not parts or size > free:
            parts.append([])
            free = SHARD_BYTES
        parts[-1].append(item)
        free -= size
    return parts
