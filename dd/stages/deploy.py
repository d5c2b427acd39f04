"""Stage: write a trained run as one ONNX file, after checking it against PyTorch on real
images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dd.data.folders import writable_folder
from dd.data.photos import Photos, Video
from dd.deploy.onnx_model import Session, exported, metadata
from dd.segmenters.base import Segmenter
from dd.store.provenance import made_by, read_own, sha256, write_atomic, write_json
from dd.training.segmentation import MAX_LONG, Predictor, Views

AGREEMENT = 0.999  # share of the pixels that must get the same class as in PyTorch


def facts(
    run: dict[str, Any],
    segmenter: Segmenter,
    views: Views,
    names: list[str],
    palette: list[int],
    weights: str,
) -> dict[str, str]:
    """The metadata of the file: everything that its user needs, each value as text (lists and
    mappings as JSON)."""
    mean, std = (
        [round(float(v), 4) for v in getattr(segmenter, k).flatten()] for k in ("mean", "std")
    )
    values = {
        "classes": list(names),
        "palette": palette,
        "size": {
            "short_side": views.short_side,
            "max_long": MAX_LONG,
            "resize": "bilinear, OpenCV's INTER_LINEAR on uint8",
        },
        "normalisation": {
            "where": "in the file: give RGB, 0..255, uint8",
            "mean": mean,
            "std": std,
        },
        "weights_sha256": run["weights_sha256"],
        "weights": weights,
        "precision": "float32",
        "supervision": run["supervision"],
        "segmenter": run["segmenter"],
    }
    return {
        k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()
    }


def deploy(
    target: str | Path,
    run: dict[str, Any],
    segmenter: Segmenter,
    views: Views,
    pictures: Photos | Video,
    names: list[str],
    palette: list[int],
    weights: str = "ema",
) -> dict[str, Any]:
    """Write ``segmenter`` (weights loaded) to ``target`` (.onnx), and the result of the check
    beside it (.json); returns this result.

    Both segment ``pictures`` (:mod:`dd.data.photos`) in float32: in a batch with their mirror
    image, and cropped. ValueError, and nothing is written, if fewer than 99.9 % of the pixels agree
    or no picture can be read. An existing file is kept if it is of this checkpoint and agrees;
    FileExistsError for one of another checkpoint, or for another kind of file.
    """
    target, found = Path(target), facts(run, segmenter, views, names, palette, weights)
    there = _there(target, found)
    writable_folder(target.parent)
    data = target.read_bytes() if there else exported(segmenter.to("cpu"), found)
    images, unreadable = _images(pictures)
    checked = compare(Session(data), Predictor({}, segmenter, views), images)
    if checked["agreement"] < AGREEMENT:
        raise ValueError(
            f"the exported network gives only {100 * checked['agreement']:.2f} % of the pixels of "
            f"{len(images)} images the class that PyTorch gives them; {100 * AGREEMENT:g} % are "
            "needed. Nothing was written"
        )
    if not there:
        write_atomic(target, data)
    result = {
        "weights_sha256": run["weights_sha256"],
        "onnx_sha256": sha256(data),
        **checked,
        **made_by(),
    }
    write_json(target.with_suffix(".json"), result)
    return {**result, "kept": there, "unreadable": unreadable}


def compare(session: Session, predictor: Predictor, images: list[np.ndarray]) -> dict[str, Any]:
    """{"agreement": share of pixels, "pixels", "images", "classes_seen"} of ONNX Runtime and
    PyTorch on the same images."""
    same = pixels = 0
    seen = set()
    for image in images:
        height, width = image.shape[:2]
        cut = image[: max(1, 2 * height // 3), : max(1, 3 * width // 4)]
        for batch in ([image, image[:, ::-1]], [cut]):
            expected = np.stack(predictor([np.ascontiguousarray(one) for one in batch]))
            shown = torch.stack(
                [predictor.views(np.ascontiguousarray(one))[0] for one in batch]
            ).numpy()
            masks = session(shown, expected.shape[1:])
            same, pixels = same + int((masks == expected).sum()), pixels + expected.size
            seen |= set(np.unique(expected).tolist())
    return {
        "agreement": same / pixels,
        "pixels": pixels,
        "images": len(images),
        "classes_seen": sorted(seen),
    }


def _images(pictures: Photos | Video) -> tuple[list[np.ndarray], list[str]]:
    """(images, why others could not be read)."""
    found = [(item, image) for item, image in pictures.read(pictures.items)]
    good = [image for _, image in found if not isinstance(image, Exception)]
    if not good:
        why = found[0][1] if found else "there are none"
        raise ValueError(
            f"no image to compare ONNX with PyTorch on could be read ({why}); give others with "
            "images=..."
        )
    bad = [
        *pictures.unreadable.values(),
        *(str(image) for _, image in found if isinstance(image, Exception)),
    ]
    return good, bad


def _there(target: Path, found: dict[str, Any]) -> bool:
    """Whether the same export already exists."""
    if target.suffix != ".onnx":
        raise ValueError(f"output={target}: expected the name of a file that ends with .onnx")
    if not target.exists():
        return False
    try:
        old = metadata(target)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"output={target} exists and is not an export of this package ({error}); choose another"
        ) from None
    checked = target.with_suffix(".json")
    if checked.is_file():
        known = read_own(checked, {"onnx_sha256": str})["onnx_sha256"]
        if known != sha256(target):
            raise FileExistsError(
                f"output={target} does not match {checked.name} beside it: it was "
                "damaged or changed. Remove "
                "it, and the same command writes it again"
            )
    differing = [k for k in found if old.get(k) != found[k]]
    if differing:
        listed = "; ".join(f"{k} {old.get(k)!s:.80} -> {found[k]!s:.80}" for k in differing[:3])
        raise FileExistsError(
            f"output={target} was exported otherwise ({listed}). Nothing was changed: choose "
            "another output=..., or remove it"
        )
    return checked.is_file()  # a file without its check is written again
