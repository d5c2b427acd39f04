"""Segment an image with an exported run: numpy, Pillow and ONNX Runtime, nothing else.

python examples/onnx_predict.py segmenter.onnx photo.jpg mask.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's bilinear resize of uint8 [H, W, 3], with its integers: the network was trained on
    such images."""

    def taps(old: int, new: int):
        place = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        first = np.floor(place).astype(np.int64)
        weight = np.rint((place - first.astype(np.float32)) * np.float32(2048)).astype(np.int64)
        return first.clip(0, old - 1), (first + 1).clip(0, old - 1), weight[:, None]

    left, right, across = taps(image.shape[1], width)
    top, bottom, down = taps(image.shape[0], height)
    rows, down = (image[:, left] * (2048 - across) + image[:, right] * across) >> 4, down[..., None]
    return ((((2048 - down) * rows[top] >> 16) + (down * rows[bottom] >> 16) + 2) >> 2).astype(
        np.uint8
    )


def main(model: str, photo: str, target: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    size, classes = json.loads(facts["size"]), json.loads(facts["classes"])
    image = np.asarray(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))
    height, width = image.shape[:2]
    scale = min(size["max_long"] / max(height, width), size["short_side"] / min(height, width))
    shown = resized(image, int(height * scale + 0.5), int(width * scale + 0.5))
    feed = {"images": shown.transpose(2, 0, 1)[None], "size": np.array([height, width], np.int64)}
    mask = session.run(["mask"], feed)[0][0]
    coloured = Image.fromarray(mask)
    coloured.putpalette(json.loads(facts["palette"]))
    coloured.save(target)
    for value, count in zip(*np.unique(mask, return_counts=True), strict=True):
        print(f"{classes[value]}: {100 * count / mask.size:.2f} %")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
