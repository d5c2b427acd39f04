"""Does a row of the self-attention link like pixels? By layer, head and timestep.

    python -m benchmarks.linking [--split tune] [--scenes 32] [--root data]
                                 [--generators embedded,embedded_mmdit] [--picture docs/linking.png]

The attention among pixels is what exponentiation spreads a class map with. Real scenes of the
embedded world are noised and shown to a generator with their caption. Of each pixel of a thing,
``lift`` is the attention that its row gives to pixels of the same thing, over this thing's share of
the image: 1 is chance, less links unlike pixels. ``near`` is the same of rows that know distance
and direction alone (the head's mean attention at each offset): a head that only looks nearby has a
lift too. Lift over ``near`` is what the head sees in the picture. Means over pixels and scenes, of
the self-attention that is read, or of the joint attention; ``mean`` is of all heads and layers
together, as the method uses them. The last line is JSON.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.embedded_masks import generator_of
from benchmarks.machine import machine
from dd.attention.observer import Attended, Observer
from dd.data.datasets import SegmentationFolder, encode_image, read_captions
from dd.report.pictures import contact_sheet, heat
from dd.stages.prepare_shapes import prepare_shapes
from dd.store.provenance import write_atomic
from dd.taxonomy import taxonomy

TIMESTEPS = (50, 350, 650)
Rows = dict[tuple[str, str], torch.Tensor]  # {(layer, head): [N, N]}
MEAN = ("all", "mean")


@torch.no_grad()
def rows_of(generator: Any, image: np.ndarray, caption: str, timestep: int, seed: int) -> Rows:
    """The attention among pixels, each row with sum 1."""
    family, layout, found = generator.family, generator.layout, {}
    sites = [s for s in generator.sites if s.side == generator.self_resolution]
    names = {s.name for s in sites if s.kind in ("self", "joint")}

    def see(name: str, attended: Attended) -> None:
        q, k = attended.q[0], attended.k[0]  # [H, N, D]
        if layout.joint:
            if layout.kind(attended) is None:
                return
            q, k = (x[:, layout.image(x.shape[1])] for x in (q, k))
        weights = (q @ k.transpose(-1, -2) * attended.scale).softmax(-1)
        found.update({(name, str(head)): weights[head].float() for head in range(len(weights))})

    latents = generator._latents(image[None])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    with Observer(generator.network, see, names):
        noised = family.noised(latents, noise.to(latents), timestep)
        family.forward(noised, timestep, family.text([caption]), generator.size)
    return {MEAN: torch.stack(list(found.values())).mean(0), **found}


def labels(mask: np.ndarray, side: int, classes: list[int]) -> torch.Tensor:
    """[N] of the class that most of a cell is of, 0 = background."""
    shares = [torch.from_numpy((mask == c).astype(np.float32)) for c in (0, *classes)]
    cells = F.adaptive_avg_pool2d(torch.stack(shares)[None], side)[0].flatten(1)
    return torch.tensor([0, *classes])[cells.argmax(0)]


def by_offset(rows_NN: torch.Tensor) -> torch.Tensor:
    """The rows that a head would have if it knew distance and direction alone: mean attention at
    each offset, put back at its place, each row with sum 1."""
    side = int(len(rows_NN) ** 0.5)
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    y, x = place.flatten(1)
    at = (y[None] - y[:, None] + side) * 2 * side + (x[None] - x[:, None] + side)
    size = 4 * side * side + 4 * side
    total = torch.zeros(size).index_add_(0, at.flatten(), rows_NN.flatten())
    number = torch.bincount(at.flatten(), minlength=size)
    mean = (total / number.clamp(min=1))[at]
    return mean / mean.sum(1, keepdim=True)


def lift(rows_NN: torch.Tensor, label_N: torch.Tensor) -> float | None:
    """Of the pixels of things; None where there is none."""
    things = label_N > 0
    if not things.any():
        return None
    same = (label_N[None] == label_N[:, None]).float()
    given = (rows_NN * same).sum(1) / same.mean(1)
    return float(given[things].mean())


def measure(name: str, data: SegmentationFolder, scenes: int) -> list[dict[str, Any]]:
    generator, captions = generator_of(name), read_captions(data.root)
    side = generator.self_resolution
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for i, sample in enumerate(data.ids[:scenes]):
        image, mask = data[i]
        text = captions[sample]["caption"]
        label = labels(mask, side, data.taxonomy.ids(captions[sample]["classes"]))
        for t in TIMESTEPS:
            for (layer, head), rows in rows_of(generator, image, text, t, i).items():
                own = lift(rows, label)
                if own is not None:
                    found[layer, head, t].append((own, lift(by_offset(rows), label)))
    table = []
    for (layer, head, t), values in found.items():
        own, near = np.mean(values, 0)
        row = {"generator": name, "layer": layer, "head": head, "timestep": t, "side": side}
        table.append(row | {"lift": float(own), "near": float(near), "scenes": len(values)})
        print(f"{name:15} {layer:50} head {head} t={t:3}: lift {own:.2f}, near {near:.2f}")
    return table


def picture(path: Path, data: SegmentationFolder, table: list[dict[str, Any]], scenes: int) -> None:
    """Of each scene the image, and for one pixel of its first thing its row: the mean of all heads,
    of the head that links best and of the one that links worst; for each generator."""
    captions, shown, titles = read_captions(data.root), [], ["scene"]
    generators = {name: generator_of(name) for name in {row["generator"]: 0 for row in table}}
    columns = {}
    for name in generators:
        own = [r for r in table if r["generator"] == name and r["timestep"] == TIMESTEPS[0]]
        one, *heads = sorted(own, key=lambda r: (r["head"] != "mean", -r["lift"] / r["near"]))
        columns[name] = {"all heads": one, "best head": heads[0], "worst head": heads[-1]}
        titles += [f"{name}: {title}, lift {r['lift']:.1f}" for title, r in columns[name].items()]
    for i in range(scenes):
        image, mask = data[i]
        classes = data.taxonomy.ids(captions[data.ids[i]]["classes"])
        parts = [image]
        for name, generator in generators.items():
            side = generator.self_resolution
            inside = (labels(mask, side, classes) == classes[0]).nonzero().flatten()
            point = int(inside[len(inside) // 2]) if len(inside) else 0
            rows = rows_of(generator, image, captions[data.ids[i]]["caption"], TIMESTEPS[0], i)
            for chosen in columns[name].values():
                row = rows[chosen["layer"], chosen["head"]][point].numpy().copy()
                row[point] = np.delete(row, point).max()  # itself would outshine all
                parts.append(marked(heat(image, row.reshape(side, side)), point, side))
        shown.append(parts)
    sheet = contact_sheet(shown, scale=1, column_labels=titles)
    write_atomic(path, encode_image(sheet, ".png"))


def marked(image: np.ndarray, point: int, side: int) -> np.ndarray:
    """The cell of a pixel in white."""
    cell = image.shape[0] // side
    y, x = (cell * v for v in divmod(point, side))
    image = image.copy()
    image[y : y + cell, x : x + cell] = 255
    return image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", default="tune")
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--root", help="where shapes is prepared (default: a temporary folder)")
    parser.add_argument("--generators", default="embedded,embedded_mmdit")
    parser.add_argument("--picture", type=Path, help="PNG of rows, for the page on the method")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    with TemporaryDirectory() as temporary:
        root = Path(options.root or temporary)
        prepare_shapes(root)
        data = SegmentationFolder(root / "shapes", options.split, taxonomy("shapes"))
        table = []
        for name in options.generators.split(","):
            table += measure(name, data, options.scenes)
        if options.picture:
            picture(options.picture, data, table, min(6, options.scenes))
    print(json.dumps({"split": options.split, "rows": table, **machine("cpu")}))


if __name__ == "__main__":
    main()
