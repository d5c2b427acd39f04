"""The paper's recipes from prompts to metrics.json on a made-up VOC devkit and COCO tree, with
the embedded generator."""

import json

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from dd import config
from dd.data.datasets import encode_image, encode_mask
from dd.stages.prepare_coco import prepare_coco
from dd.taxonomy import COCO_NAMES
from dd.training.datamodule import SegmentationData

SMALL = [
    "segmenter.depth=18",
    "segmenter.pretrained=null",
    "segmenter.sync_bn=false",
    "+segmenter.base_channels=8",
    "trainer.precision=32-true",
    "batch_size=2",
    "num_workers=0",
    "scale=64",
    "trainer.max_steps=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
]
CATEGORY_IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
NAMES = {"train": ["t1", "t2", "t3"], "val": ["v1", "v2"]}


def picture(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((48, 64), np.uint8)
    mask[8:30, 10:40] = rng.integers(1, 21)
    mask[30:31] = 255
    return rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), mask


def voc_devkit(data):
    """A devkit of five images, captions of all of them, and the train_aug folder that prepare
    makes beside it."""
    root = data / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, names in NAMES.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{n}\n" for n in names))
        for i, name in enumerate(names):
            image, mask = picture([len(split), i])
            (root / f"JPEGImages/{name}.jpg").write_bytes(encode_image(image, ".jpg"))
            (root / f"SegmentationClass/{name}.png").write_bytes(encode_mask(mask))
    augmented = data / "voc_aug"
    (augmented / "ImageSets/Segmentation").mkdir(parents=True)
    (augmented / "ImageSets/Segmentation/train_aug.txt").write_text("t1\nt2\nt3\n")
    (augmented / "SegmentationClass").symlink_to(root / "SegmentationClass")
    (augmented / "JPEGImages").symlink_to(root / "JPEGImages")
    captions = data / "captions/voc"
    captions.mkdir(parents=True)
    texts = {
        "t1": "a dog",
        "t2": "two cats",
        "t3": "a boy, a sofa",
        "v1": "a horse",
        "v2": "a hill",
    }
    rows = [{"filename": f"{name}.jpg", "caption": text} for name, text in texts.items()]
    (captions / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def coco_tree(data):
    root = data / "coco2017"
    for folder in ("annotations", "train2017", "val2017"):
        (root / folder).mkdir(parents=True)
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, COCO_NAMES, strict=True)]
    for split, names in NAMES.items():
        images, objects, captions = [], [], []
        for i, name in enumerate(names):
            file = f"{i + 1:012d}.jpg"
            (root / f"{split}2017" / file).write_bytes(
                encode_image(picture([len(split), i])[0], ".jpg")
            )
            images.append({"id": i + 1, "file_name": file, "height": 48, "width": 64})
            box = [5 + i, 5, 40, 5, 40, 30, 5 + i, 30]
            objects.append(
                {
                    "id": i + 1,
                    "image_id": i + 1,
                    "category_id": (18, 17, 90)[i],
                    "iscrowd": 0,
                    "area": 875,
                    "segmentation": [box],
                }
            )
            captions.append({"id": i + 1, "image_id": i + 1, "caption": f"it is {name}"})
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
        (root / f"annotations/captions_{split}2017.json").write_text(
            json.dumps({"images": images, "annotations": captions})
        )
    prepare_coco(data, existing=root, workers=0)


@pytest.fixture(scope="module", params=["voc", "coco"])
def table(request, tmp_path_factory, run):
    """(name of the data, root) after each recipe of its table ran once: what runs/table.sh does,
    for one seed."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    where = [f"data_root={root}/data", f"output_root={root}/outputs"]
    (voc_devkit if name == "voc" else coco_tree)(root / "data")

    def trained(recipe, *more):
        data = ["data=coco"] if name == "coco" else []  # VOC is the recipes' own
        run("train", f"experiment=paper_{recipe}", *data, *SMALL, *where, *more)

    run(
        "generate",
        f"experiment={name}",
        *where,
        "diffusion=embedded",
        "diffusion.steps=2",
        "num_images=4",
        "unit_size=2",
        "device=cpu",
    )
    trained("synthetic")
    trained("synthetic", "trainer.callbacks.ema=null", f"name={name}_synthetic_no_ema")
    run(
        "generate",
        "stage=label",
        f"labeler.run={root}/outputs/{name}_synthetic",
        f"data={name}",
        *where,
        "device=cpu",
    )
    trained(
        "synthetic",
        "synthetic_masks=masks/self_training",
        f"name={name}_self_training",
    )
    trained("finetune", "shots=2")
    trained("real")
    trained("mixed")
    for view in ([], ["scales=[0.5,0.75,1,1.25,1.5,1.75]", "flip=true"]):
        run("evaluate", f"run={root}/outputs/{name}_*", f"data={name}", *where, "device=cpu", *view)
    run(
        "evaluate",
        "stage=report",
        f"report.runs={root}/outputs",
        f"data={name}",
        f"report.domains=[{name}]",
        f"name={name}",
        *where,
    )
    return name, root


ARMS = {
    "synthetic": "A",
    "synthetic_no_ema": "A",
    "self_training": "A",
    "finetune": "A",
    "real": "real",
    "mixed": "real",
}


def test_each_recipe_ends_in_a_score(table):
    name, root = table
    classes = {"voc": 21, "coco": 81}[name]
    for recipe, supervision in ARMS.items():
        folder = root / f"outputs/{name}_{recipe}/eval/{name}"
        single, augmented = (
            json.loads((folder / f / "metrics.json").read_text()) for f in (".", "ms_flip")
        )
        for found in (single, augmented):
            assert (
                found["num_images"] == 2
                and len(found["confusion"]) == classes
                and found["supervision"] == supervision
            )
        scored = sum(map(sum, single["confusion"]))
        assert scored == (2 * 48 * 64 - 2 * 64 if name == "voc" else 2 * 48 * 64)
        assert (
            single["protocol"] == {"scales": [1.0], "flip": False, "resize": 64}
            and augmented["protocol"]["flip"]
        )


def test_the_synthetic_set_names_its_classes_right(table):
    name, root = table
    plan = [
        json.loads(line)
        for line in (root / f"data/synthetic/{name}/plan.jsonl").read_text().splitlines()
    ]
    assert len(plan) == 4
    if name == "voc":
        by_caption = {
            "a dog": ["dog"],
            "two cats": ["cat"],
            "a boy, a sofa": ["person", "sofa"],
        }  # v1 is a test image
        for sample in plan:
            caption = sample["prompt"].partition(";")[0]
            assert sample["classes"] == by_caption[caption] and sample["class_prompt"] == " ".join(
                by_caption[caption]
            )
    else:
        assert {tuple(s["classes"]) for s in plan if s["prompt"].startswith("it is")} <= {
            ("dog",),
            ("cat",),
            ("toothbrush",),
        }
        assert all(s["class_ids"] == [COCO_NAMES.index(c) + 1 for c in s["classes"]] for s in plan)


def test_the_student_learns_from_its_teacher(table):
    name, root = table
    student = json.loads((root / f"outputs/{name}_self_training/run.json").read_text())
    teacher = json.loads((root / f"outputs/{name}_synthetic/run.json").read_text())
    assert (
        student["trained_on"]["mask_settings"]["teacher"]["weights_sha256"]
        == teacher["weights_sha256"]
    )
    assert student["trained_on"]["after"] is None


def test_the_report_holds_published_and_measured_numbers(table):
    name, root = table
    html = (root / f"outputs/{name}/report.html").read_text()
    assert {"voc": "64.8", "coco": "34.2"}[name] in html
    assert (
        f"Reproduction: {name}" in html
        and "DeepLabV3 R18" in html
        and "synthetic, self-training" in html
    )


RECIPES = sorted(p.stem for p in (config.CONF / "experiment").glob("paper_*.yaml"))
RECIPES.remove("paper_budget")  # a study of the others


class TwoPictures:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        mask = rng.integers(0, 21, (12, 16)).repeat(40, 0).repeat(40, 1).astype(np.uint8)
        mask[:40] = 255
        return rng.integers(0, 256, (480, 640, 3), dtype=np.uint8), mask


@pytest.mark.full
@pytest.mark.parametrize("data", ["voc", "coco"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_takes_a_step_at_full_size(recipe, data, tmp_path, make_trainer):
    """512 px, batch 2, the model of the recipe with random weights, its transform, optimiser,
    schedule and clipping."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        given = [f"experiment={recipe}", f"data={data}", "segmenter.pretrained=null"]
        cfg = hydra.compose("train", overrides=given)
    classes = config.taxonomy(cfg)
    segmenter = config.instantiate(cfg.segmenter, num_classes=len(classes))
    module = config.instantiate(
        cfg.optimizer, segmenter=segmenter, class_names=list(classes.all_names)
    )
    before = segmenter.decode_head.conv_seg.weight.detach().clone()
    pictures = SegmentationData(
        TwoPictures(), None, config.instantiate(cfg.transform), None, 2, 0, 0
    )
    trainer = make_trainer(tmp_path, 1, gradient_clip_val=cfg.trainer.gradient_clip_val)
    trainer.fit(module, datamodule=pictures)
    assert (
        trainer.global_step == 1 and segmenter.num_classes == {"voc": 21, "coco": 81}[classes.name]
    )
    after = segmenter.decode_head.conv_seg.weight
    assert torch.isfinite(after).all() and not torch.equal(before, after)
