"""Two data sets that are awkward to export: a real one by hand, a synthetic one from the fake
generator."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from benchmarks.synthesis import synthesize
from dd.data.datasets import encode_image, encode_mask, write_split
from dd.masks.from_heat import MaskSettings
from dd.prompts.prompt import Prompts, make_prompt
from dd.stages.export import export
from dd.stages.label import label
from dd.store.provenance import write_json
from dd.taxonomy import Taxonomy, taxonomy_yaml
from tests.faults import fake

CLASSES = Taxonomy(
    "hall",
    ("gold ring", "Straße, naß", 'tv "old" {x}', "never there"),
    colours={"gold ring": (250, 200, 10), 255: (9, 9, 9)},
)
SUFFIXES = {
    "photo 1": ".png",
    "line/a": ".jpg",
    "line/b.v2": ".png",
    "50%": ".jpg",
    "größe": ".png",
}
SPLITS = {
    "train": ["photo 1", "line/a", "line/b.v2"],
    "train_small": ["line/a"],
    "val": ["50%", "größe"],
}
TEXTS = [
    '<script>alert("1")</script> a cat',
    "line one\nline two, |a| dog",
    "'{}' \\ a \u2028cow 🐄",
    "a cat",
]


class Hall:
    """The real set: where it is, and its masks as they were drawn."""

    classes, suffixes, splits = CLASSES, SUFFIXES, SPLITS

    def __init__(self, root):
        self.root, self.masks = root, {}
        for name, suffix in SUFFIXES.items():
            rng = np.random.default_rng(sum(map(ord, name)))
            size = tuple(int(n) for n in rng.integers(20, 33, 2))
            mask = rng.choice(
                np.array([0, 1, 2, 3, 255], np.uint8), (-(-size[0] // 4), -(-size[1] // 4))
            ).repeat(4, 0)
            mask = np.ascontiguousarray(mask.repeat(4, 1)[: size[0], : size[1]])
            self.masks[name] = (
                np.where(mask == 2, 0, mask).astype(np.uint8) if name == "line/a" else mask
            )
            image, path = (
                rng.integers(0, 256, (*size, 3), dtype=np.uint8),
                root / f"JPEGImages/{name}{suffix}",
            )
            for file, data in (
                (path, encode_image(image, suffix)),
                (
                    root / f"SegmentationClass/{name}.png",
                    encode_mask(self.masks[name], CLASSES.palette),
                ),
            ):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        for split, ids in SPLITS.items():
            write_split(root, split, ids)
        (root / "taxonomy.yaml").write_text(taxonomy_yaml(CLASSES))
        record = {
            "images": ["JPEGImages"],
            "parts": {},
            "taxonomy": {"name": CLASSES.name, "names": list(CLASSES.names)},
        }
        write_json(root / "dataset.json", record)  # ours, so an id may hold blanks

    def image(self, name):
        return self.root / f"JPEGImages/{name}{SUFFIXES[name]}"

    def pixels(self, name):
        return np.asarray(Image.open(self.image(name)))


@pytest.fixture
def hall(tmp_path):
    return Hall(tmp_path / "hall")


@pytest.fixture
def pets(tmp_path):
    """A finished synthetic set of four images, whose prompts hold anything."""
    classes = Taxonomy("pets", ["cat", "dog", "cow"])

    def prompts(taxonomy, number, seed):
        return Prompts([make_prompt(text, [taxonomy.names[i % 3]]) for i, text in enumerate(TEXTS)])

    synthesize(
        tmp_path / "pets",
        fake.FakeGenerator(),
        prompts,
        classes,
        4,
        1,
        2,
        "png",
        build=partial(fake.build),
    )
    label(tmp_path / "pets", MaskSettings(power=1, threshold=0.5, band=0.1))
    return tmp_path / "pets"


@pytest.fixture
def prompts(pets):
    """Those of the set: the texts with their class words."""
    found = [
        json.loads(line)["prompt"] for line in (pets / "plan.jsonl").read_text().split("\n") if line
    ]
    assert all(text in prompt for text, prompt in zip(TEXTS, found, strict=True))
    return found


@pytest.fixture
def exported(tmp_path):
    """``exported(format, folder, ...)``: the folder of an export."""

    def run(form, folder, **options):
        export(form, folder, tmp_path / f"{form} out", **options)
        return tmp_path / f"{form} out"

    return run
