"""A small synthetic set as generate.py leaves it, with its heat, and tiny checkpoints."""

import json
import shutil

import numpy as np
import pytest

from dd.data.datasets import encode_image, encode_mask, heat_bytes, write_split
from dd.store.provenance import sha256, write_json
from dd.store.samples import append_records, make_plan, plan_lines, plan_sha256
from dd.taxonomy import Taxonomy
from tests.labelers import tiny

PETS = Taxonomy("pets", ["cat", "dog", "gold ring"])
CLASSES = [("cat", "dog"), ("dog",), ("gold ring", "cat"), ("cat",), ("dog", "cat")]
SIZES = [(40, 48), (48, 40), (44, 44), (40, 48), (36, 52)]


class Asked:
    def __init__(self, classes):
        self.text = self.class_prompt = "a photo of " + " and ".join(classes)
        self.classes = classes


def write_set(root, heat=True):
    plan = make_plan([Asked(c) for c in CLASSES], PETS, 0, 2)
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "heat"):
        (root / folder).mkdir(parents=True)
    hashes = {}
    for sample, size in zip(plan, SIZES, strict=True):
        data = encode_image(rng.integers(0, 256, (*size, 3), dtype=np.uint8), ".png")
        (root / "JPEGImages" / f"{sample.id}.png").write_bytes(data)
        mask = encode_mask(rng.integers(0, 4, size, dtype=np.uint8))
        (root / "SegmentationClass" / f"{sample.id}.png").write_bytes(mask)
        hashes[sample.id] = sha256(mask)
        record = {"id": sample.id, "unit": sample.unit, "image_sha256": sha256(data)}
        if heat:
            maps = {"class_prompt": rng.random((len(sample.classes), 5, 8, 8))}
            stored = heat_bytes(maps, {"classes": sample.classes, "powers": 5})
            (root / "heat" / f"{sample.id}.safetensors").write_bytes(stored)
            record["heat_sha256"] = sha256(stored)
        append_records(root, "0", [record])
    (root / "plan.jsonl").write_text("".join(plan_lines(plan)))
    generator = {"model": "a", "power": 4} | ({} if heat else {"given": "images"})
    identity = {
        "taxonomy": {"name": "pets", "names": list(PETS.names)},
        "generator": generator,
        "plan_sha256": plan_sha256(plan),
        "image_format": ".png",
    }
    write_json(root / "run.json", {"identity": identity, "chosen_on": []})
    made = {"settings": {"power": 4, "source": "class_prompt"}, "heat": "1" * 64}
    content = {"identity": made, "chosen_on": [], "sha256": hashes}
    write_json(root / "SegmentationClass/masks.json", content)
    write_split(root, "train", [s.id for s in plan])
    return root


@pytest.fixture
def synthetic(tmp_path):
    return write_set(tmp_path / "synthetic/pets")


@pytest.fixture
def without_heat(tmp_path):
    return write_set(tmp_path / "synthetic/given", heat=False)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("sam")
    tiny.save_sam2(root / "sam2")
    tiny.save_sam2(root / "sam2_other", seed=1)
    tiny.save_sam3(root / "sam3")
    tiny.save_clip(root / "clip")
    shutil.copytree(root / "sam2", root / "pickled")
    (root / "pickled/model.safetensors").unlink()
    (root / "pickled/pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    return root


def masks_json(folder):
    return json.loads((folder / "masks.json").read_text())
