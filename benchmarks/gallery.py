"""Draws docs/synthetic.png: samples of synthetic sets as they were made, not chosen by hand.

    python -m benchmarks.gallery data/synthetic/shapes data/synthetic/shapes_mmdit [--samples 6]
                                 [--picture docs/synthetic.png]

Of the first samples of each set: the image, the heat of its first class, the mask over the image.
Sets stand side by side, with the same prompts in a row.
"""

import argparse
from pathlib import Path

from dd.data.datasets import encode_image, read_image, read_mask, stored_heat, synthetic_image
from dd.report import pictures
from dd.store.provenance import write_atomic
from dd.store.samples import read_plan
from dd.taxonomy import voc_palette


def row(folder: Path, number: int, power: int) -> tuple[str, list]:
    """(prompt, pictures) of a sample."""
    sample, palette = read_plan(folder)[number], voc_palette()
    image = read_image(synthetic_image(folder, sample.id))
    mask = read_mask(folder / "SegmentationClass" / f"{sample.id}.png")
    maps = stored_heat(folder, sample.id)["class_prompt"]
    heat = pictures.heat(image, maps[0, pictures.shown_power(maps, power)])
    return sample.prompt, [image, heat, pictures.overlay(image, mask, palette)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", type=Path, nargs="+", help="finished synthetic sets")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--power", type=int, default=4, help="of the heat that is shown")
    parser.add_argument("--picture", type=Path, default=Path("docs/synthetic.png"))
    options = parser.parse_args()
    rows, prompts = [], []
    for number in range(options.samples):
        found = [row(folder, number, options.power) for folder in options.sets]
        prompts.append(found[0][0].partition(";")[0])
        rows.append([picture for _, parts in found for picture in parts])
    titles = [
        f"{folder.name}: {what}" for folder in options.sets for what in ("image", "heat", "mask")
    ]
    sheet = pictures.contact_sheet(rows, scale=1, row_labels=prompts, column_labels=titles)
    write_atomic(options.picture, encode_image(sheet, ".png"))
    print(options.picture)


if __name__ == "__main__":
    main()
