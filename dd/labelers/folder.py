"""Masks of any origin as a mask set: drawn by people, or made by an external tool or model. The
user states their supervision."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from dd.data.datasets import check_values, image_size, read_coloured_mask, synthetic_image
from dd.labelers.base import Asked, Class, Images, Labelled, Ready
from dd.store.provenance import fingerprint, sha256
from dd.store.settings import Count, NoResult, Settings
from dd.taxonomy import Taxonomy


class FolderSettings(Settings):
    """``folder``: holds ``<id>.png`` for every sample, as class ids (grey or palette) or in the
    colours of the data set's classes; ``supervision``: their class."""

    noun = "labeler"

    folder: Annotated[str | None, NoResult("its masks are hashed")] = None
    supervision: Class | None = None
    batch_size: Annotated[Count, NoResult("changes nothing")] = 16


class MaskFolder:
    """The masks of a folder, checked and copied. ``settings``: :class:`FolderSettings`."""

    Settings: ClassVar[type[FolderSettings]] = FolderSettings
    name = "folder"
    reads = None

    def __init__(self, device: str = "cpu", **settings: Any) -> None:
        self.settings = FolderSettings(**settings)
        self.batch_size = self.settings.batch_size
        if not self.settings.folder or self.settings.supervision is None:
            raise ValueError(
                "labeler=folder needs labeler.folder=<folder of masks> and labeler.supervision: A "
                "(no real label behind them), B (a few real masks), C (all of a data set) or D (a "
                "foundation model); docs/sweeps.md, What labels decide"
            )
        self.folder = Path(self.settings.folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"labeler.folder={self.folder}: no such folder")

    def ready(self, images: Images) -> Ready:
        missing = [s.id for s in images.plan if not self._path(s.id).is_file()]
        if missing:
            raise ValueError(
                f"labeler.folder={self.folder} holds masks of other images: {len(missing)} of "
                f"{len(images.plan)} samples of {images.folder} have none there, such as "
                f"{missing[0]}.png"
            )
        for sample in images.plan:  # check all before writing, so that the folder can be repaired
            size = image_size(synthetic_image(images.folder, sample.id))
            self._read(sample.id, size, images.taxonomy)
        content = fingerprint([sha256(self._path(s.id)) for s in images.plan])
        return Ready(
            partial(self.label, taxonomy=images.taxonomy),
            str(self.settings.supervision),
            {"content": content},
            made={"folder": str(self.folder)},
        )

    def label(self, batch: list[Asked], taxonomy: Taxonomy) -> list[Labelled]:
        """The masks of samples; ValueError for other classes or another size."""
        return [Labelled(self._read(a.sample.id, a.size, taxonomy)) for a in batch]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def _read(self, name: str, size: tuple[int, int], taxonomy: Taxonomy) -> np.ndarray:
        path = self._path(name)
        mask = read_coloured_mask(path, taxonomy)
        if mask.shape != size:
            raise ValueError(
                f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}: a mask "
                "has the size of its image"
            )
        check_values(mask, taxonomy, path)
        return mask
