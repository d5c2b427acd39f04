"""Stage: a page on this machine that segments an image dropped on it with a trained run."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dd.data.datasets import encode_image, encode_mask
from dd.data.photos import MAX_PIXELS, read_photo
from dd.deploy.page_server import application
from dd.report.pictures import legend, overlay
from dd.store.provenance import read_own
from dd.store.schemas import SCORED
from dd.training.segmentation import Predictor

FILES = Path(__file__).parents[1] / "deploy" / "page"


class Upload(io.BytesIO):
    """An uploaded file, with a name for messages."""

    def __str__(self) -> str:
        return "the file"

    __repr__ = __str__  # used in Pillow's messages


def answer_of(
    predictor: Predictor, names: list[str], palette: list[int], max_pixels: int = MAX_PIXELS
) -> Callable[[bytes | bytearray], dict[str, Any]]:
    """``answer(data)``: the bytes of an image file -> {"width", "height", "image" and "overlay"
    (JPEG), "mask" (palette PNG), all as ``data:`` URIs, "areas": [{"class", "colour", "pixels",
    "percent"}]}. ValueError for a file that is not an image, or too large."""
    colours = [colour for _, colour in legend(names, palette)]

    def answer(data: bytes | bytearray) -> dict[str, Any]:
        image = read_photo(Upload(data), max_pixels)
        [mask] = predictor([image])
        counts = np.bincount(mask.ravel(), minlength=len(names)).tolist()
        areas = [
            {"class": name, "colour": colour, "pixels": count, "percent": 100 * count / mask.size}
            for name, colour, count in zip(names, colours, counts, strict=True)
        ]
        return {
            "width": mask.shape[1],
            "height": mask.shape[0],
            "areas": areas,
            "image": _uri("image/jpeg", encode_image(image, ".jpg")),
            "mask": _uri("image/png", encode_mask(mask, palette)),
            "overlay": _uri("image/jpeg", encode_image(overlay(image, mask, palette), ".jpg")),
        }

    return answer


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def about(folder: str | Path, run: dict[str, Any]) -> dict[str, Any]:
    """The page's information on its run: {"run", "trained_on", "supervision", "steps", "classes",
    "scores": [[data, mIoU]]}."""
    scores = []
    for path in sorted(Path(folder).glob("eval/*/metrics.json")):
        found = read_own(path, {**SCORED, "num_images": int})
        scores.append(
            [
                f"{found['data']}/{found['split']}, {found['num_images']} images",
                f"{found['miou']:.1f}",
            ]
        )
    trained_on = run["trained_on"]
    what = " + ".join(part for part in (trained_on["source"], trained_on.get("root")) if part)
    return {
        "run": Path(folder).resolve().name,
        "trained_on": what,
        "supervision": run["supervision"],
        "steps": run.get("steps"),
        "classes": run["taxonomy"]["names"],
        "scores": scores,
    }


def page(predictor: Predictor, names: list[str], palette: list[int], about: dict[str, Any]) -> Any:
    """The application that :func:`dd.deploy.page_server.serve` serves."""
    return application(FILES, answer_of(predictor, names, palette), about)
