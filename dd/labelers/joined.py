"""Joins mask sets of one data set: keeps what they agree on; the rest is 255."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from dd.data.datasets import check_mask, read_mask
from dd.evaluation.supervision import class_of_masks, merged, strongest
from dd.labelers.base import Asked, Images, Labelled, Ready
from dd.masks.overlaps import agreed
from dd.store.provenance import fingerprint, read_own
from dd.store.schemas import WHOLE_MASKS
from dd.store.settings import Count, NoResult, Parts, Settings
from dd.taxonomy import IGNORE


class JoinedSettings(Settings):
    """``sets``: two mask sets or more, as folders in the data set (``masks/sam3``)."""

    noun = "labeler"

    sets: list[Parts] | None = None
    batch_size: Annotated[Count, NoResult("changes nothing")] = 16


class Joined:
    """Agreement is kept as the label; disagreement becomes 255 (and is counted). The supervision
    class is the strongest of the sets. ``settings``: :class:`JoinedSettings`."""

    Settings: ClassVar[type[JoinedSettings]] = JoinedSettings
    name = "joined"
    reads = None

    def __init__(self, device: str = "cpu", **settings: Any) -> None:
        if len(set(settings.get("sets") or ())) < 2:
            raise ValueError(
                "labeler=joined needs two mask sets or more, labeler.sets=[masks/a,masks/b]; got "
                f"{settings.get('sets')}"
            )
        self.settings = JoinedSettings(**settings)
        self.batch_size = self.settings.batch_size

    def ready(self, images: Images) -> Ready:
        found = {name: finished_set(images.folder, name) for name in self.settings.sets or ()}
        for name, masks in found.items():
            check_same(images, name, masks)
        sets = [
            {"set": name, "identity": m["identity"], "masks": fingerprint(m["sha256"])}
            for name, m in found.items()
        ]
        folders = [images.folder / name for name in found]

        def label(batch: list[Asked]) -> list[Labelled]:
            return [_mask(asked, folders) for asked in batch]

        return Ready(
            label,
            strongest(class_of_masks(masks) for masks in found.values()),
            {"sets": sets},
            chosen_on=merged(*(masks.get("chosen_on") for masks in found.values())),
            made={"sets": {name: masks.get("made") for name, masks in found.items()}},
        )


def finished_set(folder: Path, name: str) -> dict[str, Any]:
    """masks.json of a finished mask set, such as ``masks/sam3``. FileNotFoundError lists the
    existing sets."""
    path = folder / name / "masks.json"
    if not path.is_file():
        found = (p.parent.relative_to(folder) for p in folder.glob("**/masks.json"))
        there = ", ".join(sorted(map(str, found)))
        raise FileNotFoundError(
            f"{folder} has no finished mask set {name} (no masks.json); there: {there or 'none'}"
        )
    return read_own(path, WHOLE_MASKS)


def check_same(images: Images, name: str, masks: dict[str, Any]) -> None:
    """ValueError if a mask set was made for other images than those of the data set."""
    ids, there = {s.id for s in images.plan}, masks["sha256"].keys()
    made_of = masks["identity"].get("images")
    if images.content and made_of not in (None, images.content):
        raise ValueError(
            f"mask set {name} was made of other images than those that {images.folder} has now. "
            "Make it again"
        )
    if other := sorted(ids ^ there):
        raise ValueError(
            f"mask set {name} is of other images: it holds {len(there)} masks, {images.folder} "
            f"{len(ids)} images, and {len(other)} are only in one of the two, such as {other[0]}. "
            "Make it again"
        )


def _mask(asked: Asked, folders: list[Path]) -> Labelled:
    paths = [folder / f"{asked.sample.id}.png" for folder in folders]
    masks = []
    for path in paths:
        check_mask(path)
        masks.append(read_mask(path))
        if masks[-1].shape != asked.size:
            raise ValueError(
                f"{path} is {masks[-1].shape[1]}x{masks[-1].shape[0]}, its image "
                f"{asked.size[1]}x{asked.size[0]}"
            )
    mask = agreed(masks)
    in_all = np.logical_and.reduce([each == IGNORE for each in masks])
    return Labelled(mask, {"disagreement": int(((mask == IGNORE) & ~in_all).sum())})
