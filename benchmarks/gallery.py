"""Draws docs/synthetic.png: samples of synthetic sets as they were made, not chosen by hand.

    python -m benchmarks.gallery data/synthetic/shapes data/synthetic/shapes_mmdit [--samples 4]
                                 [--picture docs/synthetic.png]

Of the first samples of each set: the image, the heat of its first class, the mask and the mask
over the image.
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
    return sample.prompt.partition(";")[0], [
        image,
        heat,
        *pictures.drawn(image, mask, palette).values(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", type=Path, nargs="+", help="finished synthetic sets")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--power", type=int, default=4, help="of the heat that is shown")
    parser.add_argument("--picture", type=Path, default=Path("docs/synthetic.png"))
    options = parser.parse_args()
    rows, prompts = [], []
    for folder in options.sets:
        for number in range(options.samples):
            prompt, parts = row(folder, number, options.power)
            prompts.append(f"{folder.name}: {prompt}")
            rows.append(parts)
    titles = ["image", "heat of its first class", "mask", "mask over the image"]
    sheet = pictures.contact_sheet(rows, scale=1, row_labels=prompts, column_labels=titles)
    write_atomic(options.picture, encode_image(sheet, ".png"))
    print(options.picture)


if __name__ == "__main__":
    main()
