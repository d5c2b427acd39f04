"""Mask settings chosen by a few labelled real images, the file that holds them, and what their
labels make of a run."""

import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dd import config
from dd.data.datasets import SegmentationFolder, encode_image, encode_mask, read_split, write_split
from dd.evaluation import metrics
from dd.masks.chain import parse
from dd.masks.from_heat import READING, MaskSettings, how_read
from dd.stages.calibrate import CalibrationSettings, calibrate
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.probe import score
from dd.store.provenance import read_json
from dd.store.samples import Sample
from dd.taxonomy import Taxonomy, taxonomy
from tests.doors import door
from tests.fakes import RandomGenerator

ROOT = Path(__file__).parents[2]
SHAPES = taxonomy("shapes")
GRID = {
    **{"threshold": (0.2, 0.5, 0.6), "band": 0.1, "timesteps": [50, 150]},
    **{"power": None, "source": None, "seed": 0, "append": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("data"), {"train": 12, "tune": 3, "test": 4})[0]


class Knowing(RandomGenerator):
    """A generator whose attention at 16 is the exact mask blurred by a low peak (power 1) or
    noise (power 0); at 8, noise."""

    size = 128

    def __init__(self, data, cross_resolution=16, self_resolution=16):
        self.data, self.seen = data, []
        self.reading = {"cross_resolution": cross_resolution, "self_resolution": self_resolution}

    def identity(self):
        return {"weights_sha256": "5" * 64, "steps": 3, **self.reading}

    def read_real(self, images, samples, timesteps, seed=0):
        assert (
            images.shape[1:] == (self.size, self.size, 3)
            and images.dtype == np.uint8
            and timesteps == [50, 150]
        )
        self.seen += [(s.prompt, s.class_prompt, s.class_ids) for s in samples]
        heat = []
        for sample in samples:
            mask, rng = (
                self.data[self.data.ids.index(sample.id)][1],
                np.random.default_rng([sample.seed, seed]),
            )
            exact = np.stack([mask == value for value in sample.class_ids]) * 1.0
            exact[(exact == 0) & (rng.random(exact.shape) < 0.5)] = (
                0.55  # only a threshold above 0.55 is right
            )
            noise = rng.random(exact.shape)
            maps = [noise, exact if self.reading["cross_resolution"] == 16 else noise]
            heat.append({"class_prompt": np.stack(maps, 1)})
        return heat


def choose(data, path, readings=({},), test_split="test", **kwargs):
    made = []

    def make(**reading):
        made.append(Knowing(data, **reading))
        return made[-1]

    settings = CalibrationSettings(**{**GRID, **kwargs})
    return calibrate(path, make, list(readings), data, test_split, settings), made


# The choice


def test_the_settings_that_fit_are_chosen(root, tmp_path):
    data = SegmentationFolder(root, "train", SHAPES, shots=8, seed=3)
    found, _ = choose(data, tmp_path / "c.yaml", [{"cross_resolution": c} for c in (8, 16)], seed=3)
    assert found["masks"] == {"power": 1, "threshold": 0.6, "band": 0.1, "source": "class_prompt"}
    reading = {**READING, "cross_resolution": 16, "self_resolution": 16}
    assert found["diffusion"] == reading
    calibration = found["calibration"]
    assert calibration["miou"] == calibration["miou_cross_validated"] == 100.0
    assert (calibration["shots"], calibration["seed"]) == (8, 3)
    assert found["chosen_on"] == [{"data": "shapes", "split": "train", "labels": 8, "seed": 3}]
    assert calibration["ids"] == data.ids and (calibration["data"], calibration["split"]) == (
        "shapes",
        "train",
    )
    assert calibration["generator"] == {"weights_sha256": "5" * 64, **reading}


def test_every_row_is_what_a_probe_of_these_images_finds(root, tmp_path):
    data = SegmentationFolder(root, "train", SHAPES, shots=6)
    _, (generator,) = choose(data, tmp_path / "c.yaml", batch_size=4)
    table = read_json(tmp_path / "c.json")["table"]
    assert len(table) == 2 * 3 and [r["miou"] for r in table] == sorted(
        (r["miou"] for r in table), reverse=True
    )
    seen = zip(data.ids, generator.seen, strict=True)
    samples = [
        Sample(name, "", "", (), ids, seed=i, unit=0) for i, (name, (_, _, ids)) in enumerate(seen)
    ]
    heat = list(
        zip(
            samples,
            generator.read_real(np.zeros((1, 128, 128, 3), np.uint8), samples, [50, 150]),
            strict=True,
        )
    )
    for row in table:
        settings = MaskSettings(
            power=row["power"], threshold=row["threshold"], band=row["band"], source=row["source"]
        )
        assert row["miou"] == pytest.approx(metrics.miou(score(heat, data, settings)))


def test_images_are_shown_with_their_masks_classes_and_captions(root, tmp_path):
    data = SegmentationFolder(root, "train", SHAPES, shots=8)
    _, (generator,) = choose(data, tmp_path / "c.yaml")
    for i, (prompt, class_prompt, ids) in enumerate(generator.seen):
        assert list(ids) == [v for v in np.unique(data[i][1]) if v not in (0, 255)]
        assert class_prompt == " ".join(SHAPES.all_names[v] for v in ids) and prompt.endswith(
            f"; {class_prompt}"
        )
        assert not prompt.startswith("a photo of leaf")


PETS = Taxonomy("pets", ["cat", "hot dog"])


@pytest.fixture
def pets(tmp_path):
    """A data set in VOC layout of several sizes, without captions; the last image holds no
    object."""
    folder, rng = tmp_path / "pets", np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass"):
        (folder / part).mkdir(parents=True)
    for i, size in enumerate([(20, 30), (40, 24), (16, 16)]):
        mask = (
            rng.choice([0, 1, 2, 255], size).astype(np.uint8) if i < 2 else np.zeros(size, np.uint8)
        )
        (folder / f"SegmentationClass/{i}.png").write_bytes(encode_mask(mask))
        (folder / f"JPEGImages/{i}.png").write_bytes(
            encode_image(rng.integers(0, 256, (*size, 3), np.uint8), ".png")
        )
    write_split(folder, "train", ["0", "1", "2"])
    write_split(folder, "trainval", ["0", "1", "2"])
    write_split(folder, "val", ["1"])
    write_split(folder, "empty", ["2"])
    return folder


def test_images_of_any_size_without_captions(pets, tmp_path):
    data = SegmentationFolder(pets, "train", PETS)
    found, (generator,) = choose(data, tmp_path / "c.yaml", test_split=None)
    assert [prompt for prompt, _, _ in generator.seen] == [
        "a photo of cat and hot dog; cat hot dog"
    ] * 2
    assert found["masks"]["power"] == 1 and found["calibration"]["without_object"] == 1
    assert found["calibration"]["shots"] == 3  # all labels were looked at
    assert found["calibration"]["miou_cross_validated"] is not None


def test_one_image_cannot_be_cross_validated(root, tmp_path):
    found, _ = choose(SegmentationFolder(root, "train", SHAPES, shots=1), tmp_path / "c.yaml")
    assert (
        found["calibration"]["miou_cross_validated"] is None
        and found["calibration"]["miou_paper_settings"] is None
    )


def test_the_file_is_plain_yaml(root, tmp_path):
    found, _ = choose(SegmentationFolder(root, "train", SHAPES, shots=2), tmp_path / "c.yaml")
    text = (tmp_path / "c.yaml").read_text()
    assert (
        yaml.safe_load(text) == found
        and "_target_" not in text
        and "masks_from=" in text.splitlines()[0]
    )


# What is refused


def test_nothing_is_chosen_on_the_test_split(root, pets, tmp_path):
    with pytest.raises(
        ValueError, match="calibrate.split=test: 2 of the 2 images belong to the test split 'test'"
    ):
        choose(SegmentationFolder(root, "test", SHAPES, shots=2), tmp_path / "c.yaml")
    with pytest.raises(
        ValueError,
        match="calibrate.split=trainval: 1 of the 3 images belong to the test split 'val', such",
    ):
        choose(SegmentationFolder(pets, "trainval", PETS), tmp_path / "c.yaml", test_split="val")
    assert not list(tmp_path.glob("c.*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power": [4]}, r"masks\.power=4 is not stored"),
        ({"source": ["full_prompt_caption"]}, "masks.source=full_prompt_caption is not stored"),
        ({"threshold": [2]}, r"sweep\.threshold=\[2.0\]"),
        ({"power": []}, r"sweep\.power=\[\]"),
    ],
)
def test_settings_that_cannot_be_read(root, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        choose(SegmentationFolder(root, "train", SHAPES, shots=2), tmp_path / "c.yaml", **change)


def test_images_without_an_object(pets, tmp_path):
    with pytest.raises(ValueError, match="none of the 1 images of .*empty holds an object"):
        choose(SegmentationFolder(pets, "empty", PETS), tmp_path / "c.yaml", test_split=None)


# From the choice to masks and to a run's supervision


CHOICE = {
    "masks": {"power": 1, "threshold": 0.35, "band": 0.1, "source": "class_prompt"},
    "diffusion": {"cross_resolution": 8, "self_resolution": 16},
    "chosen_on": [{"data": "shapes", "split": "train", "labels": 3, "seed": 1}],
    "calibration": {
        "by": "calibrate",
        "shots": 3,
        "ids": ["a"],
        "generator": {"self_resolution": 16},
    },
}


def compose(*overrides, script="generate"):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose(script, overrides=list(overrides))
    OmegaConf.set_struct(cfg, True)
    return cfg


def written(path, content):
    path.write_text(yaml.safe_dump(content))
    return f"masks_from={path}"


def test_a_choice_replaces_the_settings(tmp_path):
    cfg = compose(written(tmp_path / "c.yaml", CHOICE), "stage=label")
    assert config.masks_from(cfg) == CHOICE["calibration"]
    assert config.instantiate(cfg.masks) == MaskSettings(power=1, threshold=0.35, band=0.1)
    (record,) = config.chosen_on(cfg, "masks")
    assert record == {"what": "masks", "data": "shapes/train", "labels": 3, "seed": 1}
    assert (cfg.diffusion.cross_resolution, cfg.diffusion.self_resolution) == (8, 16)
    assert config.masks_from(compose()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"masks": {**CHOICE["masks"], "_target_": "os.getcwd"}},
        {"masks": {**CHOICE["masks"], "source": "${oc.env:HOME}"}},
        {"masks": {**CHOICE["masks"], "threshold": "0.5"}},
        {"masks": {"power": 1}},
        {"masks": {**CHOICE["masks"], "threshold": 1.5}},
        {"diffusion": {"model": "somewhere"}},
        {"diffusion": {"cross_layers": ["${oc.env:HOME}"]}},
        {"diffusion": {"cross_resolution": {"_target_": "os.getcwd"}}},
        {"calibration": None},
        {"calibration": {"shots": 3}},
        {"chosen_on": "tune"},
        {"chosen_on": [{"data": "shapes", "labels": 3}]},
    ],
)
def test_other_content_is_refused(tmp_path, change):
    cfg = compose(written(tmp_path / "c.yaml", {**CHOICE, **change}), "stage=label")
    before = OmegaConf.to_yaml(cfg)
    with pytest.raises(ValueError, match="is not a file of stage=calibrate or stage=sweep"):
        config.masks_from(cfg)
    assert OmegaConf.to_yaml(cfg) == before


def test_files_that_are_no_choice(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="masks_from=.*nowhere.yaml: no such file"):
        config.masks_from(compose(f"masks_from={tmp_path}/nowhere.yaml"))
    (tmp_path / "a.yaml").write_text("- just\n- a list\n")
    (tmp_path / "b.yaml").write_text("!!python/object/apply:os.getcwd []\n")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="is not a file of stage=calibrate"):
            config.masks_from(compose(f"masks_from={tmp_path}/{name}.yaml"))
    given = written(tmp_path / "c.yaml", CHOICE)
    with pytest.raises(ValueError, match="masks_from has no effect with stage=sweep"):
        config.masks_from(compose(given, "stage=sweep", script="evaluate"))
    monkeypatch.setattr(sys, "argv", ["generate.py", given, "masks.band=0.2"])
    with pytest.raises(ValueError, match="and masks.band=0.2 contradict each other"):
        config.masks_from(compose(given, "masks.band=0.2"))


# The whole chain on the embedded world


def generate(*overrides):
    return door("generate").run(compose(*overrides))


def evaluate(*overrides):
    return door("evaluate").run(compose(*overrides, script="evaluate"))


def test_from_labelled_images_to_the_record_of_a_training(root, tmp_path):
    where = [
        f"data_root={root.parent}",
        f"output_root={tmp_path}/out",
        "device=cpu",
        "experiment=shapes",
    ]
    small = [
        "calibrate.shots=3",
        "calibrate.timesteps=[100]",
        "sweep.power=[0,1]",
        "sweep.threshold=[0.4,0.5]",
    ]
    found = evaluate(
        "stage=calibrate", *where, *small, "calibrate.cross_resolution=[8,16]", "seed=1"
    )
    path = tmp_path / "out/shapes/calibration_shapes_train_3_seed1.yaml"
    choice = yaml.safe_load(path.read_text())
    calibration = choice["calibration"]
    assert (
        calibration["miou"] == found
        and len(read_json(path.with_suffix(".json"))["table"]) == 2 * 2 * 2 * 3
    )
    train = compose_train(root, "shots=3", "seed=1")
    assert (
        calibration["ids"] == config.training_sets(train)[0].ids
    )  # the images a fine-tuning takes anyway

    layers = [
        "calibrate.cross_layers=[null,[up_blocks.1],[down_blocks]]",
        "calibrate.cross_heads=[null,[1]]",
    ]
    evaluate("stage=calibrate", *where, *small, *layers, "name=layers", "calibrate.shots=1")
    tried = read_json(tmp_path / "out/layers/calibration_shapes_train_1_seed0.json")["table"]
    assert {(str(r["cross_layers"]), str(r["cross_heads"])) for r in tried} == {
        (layers, heads)
        for layers in ("None", "['up_blocks.1']", "['down_blocks']")
        for heads in ("None", "[1]")
    }
    evaluate(
        "stage=calibrate",
        *where,
        *small,
        "calibrate.cross_layers=[[up_blocks.1]]",
        "name=one",
        "calibrate.shots=1",
    )
    written_as = (tmp_path / "out/one/calibration_shapes_train_1_seed0.yaml").read_text()
    assert written_as.count("- up_blocks.1") == 2 and "&" not in written_as

    made = ["num_images=2", "unit_size=2", "diffusion.steps=1", f"folder={tmp_path}/set"]
    generate(*where, *made, f"masks_from={path}")
    masks = read_json(tmp_path / "set/SegmentationClass/masks.json")["identity"]
    assert masks["settings"] == choice["masks"] and masks["calibration"] == calibration
    by_images = {"what": "masks", "data": "shapes/train", "labels": 3, "seed": 1}
    assert read_json(tmp_path / "set/SegmentationClass/masks.json")["chosen_on"] == [by_images]
    card = (tmp_path / "set/README.md").read_text()
    assert "3 real labels are behind it" in card and "3 labels of shapes/train" in card
    identity = read_json(tmp_path / "set/run.json")["identity"]["generator"]
    assert how_read(identity) == choice["diffusion"]

    cfg = compose_train(root, "source=synthetic", "shots=null", f"synthetic={tmp_path}/set")
    _, record = config.training_record(cfg, config.training_sets(cfg)[0])
    assert (
        record["supervision"] == "B"
        and record["trained_on"]["mask_settings"]["calibration"] == calibration
    )
    assert record["chosen_on"][0] == by_images
    generate(*where, f"folder={tmp_path}/set", "stage=label", "mask_set=paper", "masks=paper")
    cfg = compose_train(
        root,
        "source=synthetic",
        "shots=null",
        f"synthetic={tmp_path}/set",
        "synthetic_masks=masks/paper",
    )
    assert "masks" not in {
        c["what"] for c in config.training_record(cfg, config.training_sets(cfg)[0])[1]["chosen_on"]
    }

    score = evaluate(
        *where, f"folder={tmp_path}/set", "stage=sweep", f"sweep.masks={tmp_path}/set/masks/paper"
    )
    swept = tmp_path / "set/sweeps/paper.json"
    assert (
        score == 100.0
        and read_json(swept)["masks"]["power"]
        == read_json(tmp_path / "set/masks/paper/masks.json")["identity"]["settings"]["power"]
    )
    generate(
        *where, f"folder={tmp_path}/set", "stage=label", "mask_set=swept", f"masks_from={swept}"
    )
    masks = read_json(tmp_path / "set/masks/swept/masks.json")
    assert masks["identity"]["calibration"]["by"] == "sweep"
    assert masks["chosen_on"] == []
    against = f"sweep.masks={tmp_path}/set/SegmentationClass"
    evaluate(*where, f"folder={tmp_path}/set", "stage=sweep", against)
    by_set = f"masks_from={tmp_path}/set/sweeps/SegmentationClass.json"
    generate(*where, f"folder={tmp_path}/set", "stage=label", "mask_set=again", by_set)
    masks = read_json(tmp_path / "set/masks/again/masks.json")
    assert masks["chosen_on"] == [by_images]  # what is behind the set it was compared with

    other = {**choice, "calibration": {**calibration, "generator": {"weights_sha256": "0" * 64}}}
    given = written(tmp_path / "other.yaml", other)
    for stage in ("all", "label"):
        with pytest.raises(
            ValueError, match="chosen for other attention .*\n  weights_sha256: .* -> 0000"
        ):
            generate(*where, *made, f"stage={stage}", given)
    with pytest.raises(ValueError, match="give one of them, got sweep.masks=None, sweep.run=None"):
        evaluate(*where, "stage=sweep")
    with pytest.raises(FileNotFoundError, match="nowhere: no finished training run there"):
        evaluate(*where, f"folder={tmp_path}/set", "stage=sweep", "sweep.run=nowhere")
    assert read_split(root, "train")


def compose_train(root, *overrides):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return hydra.compose(
            "train", overrides=["experiment=shapes_real", f"data_root={root.parent}", *overrides]
        )


def test_labelled_images_choose_among_chains(root, tmp_path):
    """The exact map is that of power 1: a walk mixes it with noise, and noise refined is noise."""
    chains = {
        "paper": [{"propagate": "power"}, {"normalise": "min_max"}, {"threshold": "fixed"}],
        "refined": [
            {"propagate": "walk"},
            {"normalise": "min_max"},
            {"refine": "pamr", "dilations": [1]},
            {"threshold": "otsu"},
        ],
    }
    data = SegmentationFolder(root, "train", SHAPES, shots=4)
    path = tmp_path / "c.yaml"
    found, _ = choose(data, path, chains=chains)
    table = read_json(tmp_path / "c.json")["table"]
    assert len(table) == 2 * 3 + 1  # powers and thresholds, and one that reads neither
    best = max(table, key=lambda row: row["miou"])
    assert MaskSettings(**found["masks"]).identity() == found["masks"]
    assert {k: best[k] for k in found["masks"]} == found["masks"]
    assert found["masks"]["power"] == 1 and "band" not in found["masks"]
    assert found["masks"]["steps"] == [step.plain() for step in parse(chains["paper"])]
    # and the file is taken by masks_from, whatever chain the configuration has
    cfg = config.compose("generate", [f"masks_from={path}", "masks=refined"])
    config.masks_from(cfg)
    assert config.instantiate(cfg.masks) == MaskSettings(**found["masks"])
