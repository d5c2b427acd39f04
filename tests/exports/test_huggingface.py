import json
import sys

import datasets
import numpy as np
import pytest
import yaml

from dd.exports import target
from dd.stages.export import export
from dd.store.provenance import read_json, write_json


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The datasets library keeps what it has read; not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def compare(data, hall, split):
    assert data["id"] == hall.splits[split]
    for row in data:
        assert row["mask"].mode == "P" and np.array_equal(
            np.asarray(row["mask"]), hall.masks[row["id"]]
        )
        assert np.array_equal(np.asarray(row["image"].convert("RGB")), hall.pixels(row["id"]))
        present = {hall.classes.all_names[v] for v in np.unique(hall.masks[row["id"]]) if v != 255}
        assert set(row["present"]) == present


@pytest.mark.parametrize("split", ["train", "train_small", "val"])
def test_the_datasets_library_reads_parquet_and_image_folder(hall, exported, split):
    root = exported("huggingface", hall.root)
    compare(datasets.load_dataset(str(root), split=split), hall, split)  # as the card's header says
    files = {split: str(root / f"data/{split}-*.parquet")}
    compare(datasets.load_dataset("parquet", data_files=files, split=split), hall, split)
    folder = {split: str(root / f"imagefolder/{split}/**")}
    compare(datasets.load_dataset("imagefolder", data_files=folder, split=split), hall, split)


def test_prompts_and_seeds_survive(pets, exported, prompts):
    root = exported("huggingface", pets)
    plan = [json.loads(line) for line in (pets / "plan.jsonl").read_text().split("\n") if line]
    for arguments in (
        {"path": str(root)},
        {"path": "imagefolder", "data_files": {"train": f"{root}/imagefolder/train/**"}},
    ):
        data = datasets.load_dataset(**arguments, split="train")
        assert data["prompt"] == prompts and data["classes"] == [
            [c] for c in ("cat", "dog", "cow", "cat")
        ]
        assert data["seed"] == [row["seed"] for row in plan]


def test_shards_are_counted_and_read_in_order(hall, exported, monkeypatch):
    monkeypatch.setattr(target, "SHARD_BYTES", 1)
    root = exported("huggingface", hall.root)
    names = sorted(p.name for p in (root / "data").glob("train-*"))
    assert names == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    compare(datasets.load_dataset(str(root), split="train"), hall, "train")


def header(root):
    return yaml.safe_load((root / "README.md").read_text().split("---\n")[1])


def test_the_card_tells_origin_licence_and_classes(pets, exported):
    root = exported("huggingface", pets)
    found, text = header(root), (root / "README.md").read_text()
    assert found["license"] == "apache-2.0" and found["task_categories"] == ["image-segmentation"]
    assert "synthetic" in found["tags"] and found["size_categories"] == ["n<1K"]
    assert "**Synthetic**" in text and "Apache-2.0" in text and "| 3 | cow |" in text
    assert json.loads((root / "id2label.json").read_text()) == {
        "0": "background",
        "1": "cat",
        "2": "dog",
        "3": "cow",
        "255": "uncertain",
    }


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (
            {"licence": "CreativeML OpenRAIL-M", "link": "https://x/y"},
            {"license": "creativeml-openrail-m"},
        ),
        (
            {"licence": "House rules", "link": "https://x/y"},
            {"license": "other", "license_name": "House rules", "license_link": "https://x/y"},
        ),
        (None, {"license": "unknown"}),
    ],
)
def test_the_licence_is_the_set_s_own(pets, exported, terms, expected):
    write_json(pets / "run.json", read_json(pets / "run.json") | {"terms": terms})
    found = header(exported("huggingface", pets))
    assert {k: v for k, v in found.items() if k.startswith("license")} == expected


def test_the_card_tells_of_an_adapted_generator(pets, exported):
    run = read_json(pets / "run.json")
    run["identity"]["generator"] |= {"adapter_sha256": "ab" * 32, "adapter_weight": 0.8}
    write_json(pets / "run.json", run)
    text = (exported("huggingface", pets) / "README.md").read_text()
    assert "LoRA layers of weight 0.8 (sha256 `abab" in text and "privacy" in text


def test_real_data_has_no_prompts_and_no_licence_of_ours(hall, exported):
    root = exported("huggingface", hall.root)
    assert header(root)["license"] == "unknown" and "tags" not in header(root)
    assert "Synthetic" not in (root / "README.md").read_text()
    assert "| 2 | Straße, naß | 4 |" in (root / "README.md").read_text()  # line/a has none
    assert "| 4 | never there | 0 | 0.00 % |" in (root / "README.md").read_text()
    assert set(datasets.load_dataset(str(root), split="val").column_names) == {
        "id",
        "image",
        "mask",
        "present",
    }


def test_without_pyarrow_nothing_is_written(hall, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow.*\[exports\]"):
        export("huggingface", hall.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_split_that_the_datasets_library_refuses(hall, tmp_path):
    lists = hall.root / "ImageSets/Segmentation"
    (lists / "shots=2.txt").write_text("50%\n")
    with pytest.raises(ValueError, match=r"shots=2.*--split"):
        export("huggingface", hall.root, tmp_path / "out")
    assert export("huggingface", hall.root, tmp_path / "out", splits=["val"])["images"] == 2
