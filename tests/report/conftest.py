"""A made-up study for the reports, written in the formats on disk: a synthetic set, real test
images, runs with results."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dd.data.datasets import SegmentationFolder
from dd.embedded.scenes import scene
from dd.evaluation.budget import Prices
from dd.evaluation.budget_results import Measured, differences, skipped, target_costs
from dd.store.provenance import sha256
from dd.taxonomy import SHAPES_NAMES, Taxonomy, voc_palette

SHAPES = Taxonomy("shapes", SHAPES_NAMES)
NAMES = list(SHAPES.all_names)
EVIL = "<script>alert('x')</script> & \"quoted\""


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if pixels.ndim == 2:
        image.putpalette(voc_palette())
    image.save(path)


def make_synthetic(folder, count=14, size=128):
    """A finished synthetic set with signals and a sweep; sample 000001 has an evil prompt and
    lacks its first class."""
    rng, plan, records = np.random.default_rng(0), [], []
    for i in range(count):
        s = scene("shapes", "train", i)
        ids = [NAMES.index(c) for c in s.classes]
        mask = s.mask.copy()
        mask[:3] = 255
        if i == 1:
            mask[mask == ids[0]] = 0
        name = f"{i:06d}"
        image = np.asarray(Image.fromarray(s.image).resize((size, size)))
        write_image(folder / f"JPEGImages/{name}.png", image)
        write_image(
            folder / f"SegmentationClass/{name}.png",
            np.asarray(Image.fromarray(mask).resize((size, size), 0)),
        )
        small = np.stack([(s.mask == c).reshape(16, size // 16, 16, -1).mean((1, 3)) for c in ids])[
            :, None
        ]
        heat = (small + 0.05 * rng.random((len(ids), 3, 16, 16))).astype(np.float32)
        (folder / "heat").mkdir(exist_ok=True)
        save_file({"class_prompt": heat}, folder / f"heat/{name}.safetensors")
        plan.append(
            {
                "id": name,
                "prompt": EVIL if i == 1 else s.caption,
                "class_prompt": " ".join(s.classes),
                "classes": list(s.classes),
                "class_ids": ids,
                "seed": 1000 + i,
                "unit": i // 2,
            }
        )
        signal = {
            k: heat.astype(float).max((2, 3)).tolist()
            for k in ("peak", "spread", "entropy", "area")
        }
        signals = {
            "heat": {"class_prompt": signal},
            "clip": {"prompt": 20 + i / 10, "classes": [21.0] * len(ids)},
        }
        records.append(
            {
                "id": name,
                "unit": i // 2,
                "attempt": 0,
                "image_sha256": sha256(folder / f"JPEGImages/{name}.png"),
                "heat_sha256": sha256(folder / f"heat/{name}.safetensors"),
                "seconds": 0.5,
                "signals": signals,
            }
        )
    (folder / "plan.jsonl").write_text("".join(json.dumps(p) + "\n" for p in plan))
    (folder / "records").mkdir()
    (folder / "records/0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    identity = {
        "generator": {"model": "embedded"},
        "taxonomy": {"name": "shapes", "names": list(SHAPES_NAMES)},
    }
    write(
        folder / "run.json",
        {
            "identity": identity,
            "versions": {"torch": "2"},
            "git_commit": "abc",
            "command": "generate.py",
        },
    )
    settings = {"power": 1, "threshold": 0.5, "band": 0.1, "source": "class_prompt"}
    write(
        folder / "SegmentationClass/masks.json", {"identity": {"settings": settings, "heat": "0"}}
    )
    table = [
        {
            "power": p,
            "threshold": t,
            "band": 0.1,
            "source": "class_prompt",
            "miou": 70 - (p - 2) ** 2 - 40 * abs(t - 0.5),
            "miou_certain": 75.0,
            "uncertain": 3.0,
        }
        for p in range(5)
        for t in (0.3, 0.4, 0.5, 0.6)
    ]
    table.sort(key=lambda r: -r["miou"])
    write(
        folder / "sweeps/human.json",
        {"masks": {}, "sweep": {"against": "human/masks", "table": table}},
    )
    return folder


def make_test(root, count=12):
    for i in range(count):
        s = scene(root.name, "test", i)
        write_image(root / f"JPEGImages/t{i}.png", s.image)
        write_image(root / f"SegmentationClass/t{i}.png", s.mask)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/test.txt").write_text("".join(f"t{i}\n" for i in range(count)))
    return SegmentationFolder(root, "test", SHAPES)


def scores(confusion):
    """mIoU, IoUs and accuracy, once more and in plain Python."""
    n, ious = len(confusion), []
    for c in range(n):
        union = sum(confusion[c]) + sum(confusion[r][c] for r in range(n)) - confusion[c][c]
        ious.append(100 * confusion[c][c] / union if union else None)
    present = [v for v in ious if v is not None]
    right = sum(confusion[c][c] for c in range(n))
    return sum(present) / len(present), ious, 100 * right / sum(map(sum, confusion))


def make_result(folder, data, error, seed, names=NAMES, per_image=True, **more):
    """metrics.json with predictions that are wrong on a share of ``error`` of each image, more
    on later images."""
    rng, images = np.random.default_rng(seed), []
    for i, name in enumerate(data.ids):
        truth = data[i][1]
        share = min(0.95, error * (0.5 + i / len(data)))
        cell = len(truth) // 8
        wrong = np.repeat(np.repeat(rng.random((8, 8)) < share, cell, 0), cell, 1)
        predicted = np.where(wrong, rng.integers(0, len(names)), truth).astype(np.uint8)
        write_image(folder / f"examples/{name}.png", predicted)
        image = np.zeros((len(names), len(names)), np.uint32)
        np.add.at(image, (truth, predicted), 1)
        images.append(image)
    confusion = np.sum(images, 0).astype(int).tolist()
    miou, ious, accuracy = scores(confusion)
    found = {
        "data": data.root.name,
        "split": data.split,
        "masks": data.masks,
        "num_images": len(data),
        "weights_sha256": "c" * 64,
        "protocol": {"scales": [1.0], "flip": False, "resize": 128},
        "supervision": "A",
        "trained_on": {},
        "masks_made_with": None,
        "miou": miou,
        "iou": dict(zip(names, ious, strict=True)),
        "pixel_accuracy": accuracy,
        "confusion": confusion,
        **more,
    }
    if per_image:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            folder / "per_image.npz", confusion=np.stack(images), ids=np.array(data.ids)
        )
        sha = hashlib.sha256((folder / "per_image.npz").read_bytes()).hexdigest()
        found["per_image"] = {"file": "per_image.npz", "sha256": sha}
    write(folder / "metrics.json", found)
    return found


def make_run(
    folder,
    tests,
    error,
    seed=0,
    source="synthetic",
    shots=None,
    after=None,
    steps=300,
    rate=3e-3,
    data=None,
    **more,
):
    """A finished run with a learning curve and results on ``tests``. ``after``: the folder of the
    run that it goes on from; ``data``: keys of trained_on."""
    before = json.loads((after / "run.json").read_text()) if after else None
    trained_on = {
        "source": source,
        "root": "shapes",
        "split": "train",
        "masks": "SegmentationClass",
        "images": shots if type(shots) is int else 512,
        "shots": shots,
        "seed": seed,
        "after": before and before["trained_on"],
        "mask_settings": {},
        **(data or {}),
    }
    if source == "real":
        del trained_on["mask_settings"]
    segmenter = {"_target_": "dd.segmenters.deeplabv3.DeepLabV3", "depth": 18}
    identity = {
        "segmenter": segmenter,
        "seed": seed,
        "trainer": {"max_steps": steps, "callbacks": {"ema": {"decay": 0.98}}},
        "optimizer": {"learning_rate": rate},
        "trained_on": trained_on,
        "init_from_sha256": before and "c" * 64,
    }
    run = {
        "steps": steps,
        "identity": identity,
        "segmenter": segmenter,
        "trained_on": trained_on,
        "seconds": 60.0,
        "weights_sha256": "c" * 64,
        "supervision": "real" if source == "real" and after is None else "A",
        "versions": {"torch": "2.13.0"},
        "git_commit": "0123456789abcdef+",
        "command": f"train.py {EVIL}",
    }
    write(folder / "run.json", run)
    lines = ["epoch,step,train/loss,tune/miou"]
    for step in range(9, steps, 10):
        lines.append(f"0,{step},{3 / (1 + step / 40) + 0.1 * ((step * 7 + seed) % 11) / 11},")
        if step % 100 == 99:
            lines.append(f"0,{step},,{60 * (1 - 2 ** (-step / 80))}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n0,torn")
    for data in tests:
        make_result(
            folder / f"eval/{data.root.name}", data, error, seed + 10 * len(folder.parts), **more
        )
    return folder


def make_budget() -> dict:
    """budget.json of a study of three seeds, the last of which lacks a run."""
    arms = {
        "finetune": {
            "0": {"shapes": [60.0, 62.0, 61.0]},
            "16": {"shapes": [68.0, 70.0, 69.0]},
            "all": {"shapes": [76.0, 78.0, 77.0]},
        },
        "real": {
            "16": {"shapes": [50.0, 51.0, None]},
            "64": {"shapes": [66.0, 64.0, 65.0]},
            "all": {"shapes": [75.0, 77.0, 77.5]},
        },
    }
    seconds = {
        "finetune": {k: {"shapes": [3600.0] * 3} for k in arms["finetune"]},
        "real": {k: {"shapes": [1800.0] * 3} for k in arms["real"]},
    }
    edge = {"chosen": 0.003, "edge": {"end": "highest", "add": 0.009}}
    prices = Prices(minutes_per_image=10, per_hour=24, per_gpu_hour=2)
    found = Measured(arms, {"shapes": 512}, [0, 1, 2], ["shapes"])
    study = {
        "study": "shapes_budget",
        "domains": {"shapes": 512},
        "seeds": [0, 1, 2],
        "draws": ["shapes"],
        "arms": arms,
        "differences": differences(found),
        "skipped": skipped(found),
        "runs": [{"domain": "shapes", "num_images": 40}],
        "learning_rates": {"real": {"by_shots": {"16": edge}}},
        "cost": {
            "prices": vars(prices),
            "seconds": seconds,
            "targets": target_costs(found, seconds, prices, [65.0]),
        },
    }
    return json.loads(json.dumps(study))


BUDGET = make_budget()


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """Folder with data/synthetic/shapes, data/{shapes,shapes_shift} and outputs/shapes; never
    changed by a test."""
    return make_study(tmp_path_factory.mktemp("study"))


def make_study(root, size=128, count=14):
    make_synthetic(root / "data/synthetic/shapes", count, size)
    tests = [make_test(root / f"data/{name}") for name in ("shapes", "shapes_shift")]
    runs = root / "outputs/shapes"
    for seed in (0, 1):
        make_run(runs / f"synthetic/seed={seed}", tests, 0.30 + 0.02 * seed, seed)
        for shots, error in ((16, 0.5), (64, 0.25)):
            make_run(
                runs / f"real/shots={shots},seed={seed}",
                tests,
                error,
                seed,
                "real",
                shots,
                steps=400,
            )
            after = runs / f"synthetic/seed={seed}"
            make_run(
                runs / f"finetune/shots={shots},seed={seed}",
                tests,
                error / 2,
                seed,
                "real",
                shots,
                after,
                100,
            )
    write(root / "outputs/shapes/shapes_budget/budget.json", BUDGET)
    return root


@pytest.fixture
def tests_of(study):
    return {
        n: SegmentationFolder(study / f"data/{n}", "test", SHAPES)
        for n in ("shapes", "shapes_shift")
    }


@pytest.fixture
def builder():
    """The functions that write the parts of a study."""
    from types import SimpleNamespace

    return SimpleNamespace(
        run=make_run,
        result=make_result,
        test=make_test,
        synthetic=make_synthetic,
        scores=scores,
        names=NAMES,
        shapes=SHAPES,
        budget=BUDGET,
        evil=EVIL,
    )
