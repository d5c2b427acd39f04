"""The style of photographs on synthetic images: what changes, what stays, which draws, what a run records."""

import json
from types import SimpleNamespace

import cv2
import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from dd import config
from dd.datamodule import MixedSchedule, Mixture, Schedule, SegmentationData
from dd.photos import Unlabelled
from dd.provenance import read_json, write_json
from dd.stages.prepare import prepare_shapes
from dd.style import Style, colour_transfer, fourier_transfer, from_lab, to_lab
from dd.taxonomy import Taxonomy

RNG = np.random.default_rng(5)


def picture(height, width, mean=(120, 130, 110), spread=20, seed=0):
    """Smooth noise around a colour, far from black and white."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(0, 1, (height, width, 3)), (0, 0), 1.5)
    return (noise / noise.std() * spread + mean).clip(20, 235).astype(np.uint8)


class Photos(list):
    """Photographs in memory."""

    def fingerprint(self):
        return {"number": len(self), "sha256": "0" * 64}


# CIELAB


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)), ((0, 0, 255), (32.30, 79.19, -107.86)), ((128, 128, 128), (53.59, 0, 0)),
    ],
)  # fmt: skip
def test_known_colours(rgb, lab):
    assert to_lab(np.array([rgb], np.uint8))[0] == pytest.approx(lab, abs=0.03)


def test_lab_is_that_of_opencv_and_comes_back():
    colours = RNG.integers(0, 256, (200, 100, 3), dtype=np.uint8)
    theirs = cv2.cvtColor(colours.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    assert np.abs(to_lab(colours) - theirs).max() < 0.5
    assert np.array_equal(from_lab(to_lab(colours)), colours)


# Colour


def test_colours_get_the_photographs_mean_and_deviation():
    image, photo = picture(48, 64), picture(90, 70, (160, 110, 100), 12, 1)
    found, wanted = to_lab(colour_transfer(image, photo)), to_lab(photo)
    assert found.shape == image.shape and np.abs(to_lab(image).mean((0, 1)) - wanted.mean((0, 1))).max() > 5
    assert found.mean((0, 1)) == pytest.approx(wanted.mean((0, 1)), abs=0.3)
    assert found.std((0, 1)) == pytest.approx(wanted.std((0, 1)), abs=0.3)


def test_a_channel_without_variation_is_moved_alone():
    """Rounding errors of a grey image are not blown up to colours."""
    grey = picture(40, 40).mean(2, keepdims=True).astype(np.uint8).repeat(3, 2)
    found = to_lab(colour_transfer(grey, picture(40, 40, (150, 120, 90), 15, 2)))
    assert found[..., 1:].std((0, 1)).max() < 1 and found[..., 2].mean() > 5
    flat = colour_transfer(np.full((8, 8, 3), 100, np.uint8), picture(30, 30))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


def test_the_colours_of_an_enormous_photograph_are_sampled(monkeypatch):
    photo = picture(64, 96, seed=3)
    whole = colour_transfer(picture(32, 32), photo)
    monkeypatch.setattr("dd.style.SAMPLED", 64 * 96 // 4)
    looked = []
    monkeypatch.setattr("dd.style.to_lab", lambda x: looked.append(x.shape) or to_lab(x))
    assert np.abs(colour_transfer(picture(32, 32), photo).astype(int) - whole).max() < 12
    assert looked == [(32, 32, 3), (32, 48, 3)]


# Fourier


@pytest.mark.parametrize(("size", "bandwidth"), [((48, 64), 0.1), ((33, 47), 0.2), ((64, 64), 0.01)])
def test_low_frequencies_are_the_photographs_and_the_phase_stays(size, bandwidth):
    image, photo = picture(*size, spread=12), picture(*size, (100, 120, 140), 9, 4)
    found = fourier_transfer(image, photo, bandwidth).astype(float)
    assert found.min() > 0 and found.max() < 255  # nothing was clipped
    half = int(bandwidth * min(size))
    centre = tuple(n // 2 for n in size)
    square = np.zeros(size, bool)
    square[centre[0] - half : centre[0] + half + 1, centre[1] - half : centre[1] + half + 1] = True

    def spectrum(x):
        return np.fft.fftshift(np.fft.fft2(x, axes=(0, 1)), axes=(0, 1))

    ours, before, theirs = (spectrum(x) for x in (found, image, photo))
    noise = 0.3 * np.sqrt(size[0] * size[1]) * 5  # of rounding to whole numbers, five standard deviations
    expected = np.where(square[..., None], np.abs(theirs), np.abs(before)) * np.exp(1j * np.angle(before))
    limit = np.full(size, noise)
    limit[centre] = 0.5 * size[0] * size[1]  # of the mean colour, if all pixels are rounded alike
    assert (np.abs(ours - expected) < limit[..., None]).all()
    assert np.abs(before - expected)[square].max() > noise


def test_the_whole_square_takes_all_amplitudes():
    image, photo = picture(32, 32, spread=8), picture(32, 32, (130, 120, 110), 8, 6)
    found = np.abs(np.fft.fft2(fourier_transfer(image, photo, 0.5).astype(float), axes=(0, 1)))
    assert np.abs(found - np.abs(np.fft.fft2(photo.astype(float), axes=(0, 1)))).max() < 0.3 * 32 * 5


@pytest.mark.parametrize("transfer", [colour_transfer, lambda i, p: fourier_transfer(i, p, 0.1)], ids=["color", "fourier"])
class TestBoth:
    def test_an_images_own_style_changes_nothing(self, transfer):
        image = RNG.integers(0, 256, (37, 52, 3), dtype=np.uint8)
        assert np.abs(transfer(image, image).astype(int) - image).max() <= 1

    def test_photographs_of_any_size_and_kind(self, transfer, tmp_path):
        files = {
            "grey.png": Image.fromarray(picture(20, 30)[..., 0]),
            "deep.png": Image.fromarray(RNG.integers(0, 65536, (25, 40)).astype(np.uint16)),
            "tiny.png": Image.fromarray(picture(1, 1)),
            "thin.png": Image.fromarray(picture(2, 300)),
            "large.jpg": Image.fromarray(picture(700, 500)),
        }
        for name, file in files.items():
            file.save(tmp_path / name)
        photos, image = Unlabelled(tmp_path), picture(48, 64)
        assert len(photos) == 5
        before = image.copy()
        for i in range(5):
            found = transfer(image, photos[i])
            assert found.shape == image.shape and found.dtype == np.uint8
            assert not np.array_equal(found, image)
        assert np.array_equal(image, before)


# Draws


def test_share_and_photograph_are_drawn_by_the_seed_alone():
    photos, image = Photos(picture(16, 16, (60 + 20 * i, 120, 120), 5, i) for i in range(5)), picture(16, 16)
    style = Style(photos, "color", 0.3)
    one = [style(image, seed) for seed in range(400)]
    np.random.seed(3)
    two = [style(image, seed) for seed in reversed(range(400))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    changed = [x for x in one if not np.array_equal(x, image)]
    assert 90 < len(changed) < 150
    assert len({x.tobytes() for x in changed}) == 5
    assert all(not np.array_equal(Style(photos, "color", 1)(image, seed), image) for seed in range(50))


class Pictures:
    """Indexable images of one grey level, masks of another."""

    taxonomy = Taxonomy("pets", ["cat"])

    def __init__(self, count, level):
        self.count, self.level = count, level

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return np.full((8, 8, 3), self.level + i, np.uint8), np.full((8, 8), 1, np.uint8)


def whole(image, mask, seed):
    return torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1).copy()), torch.from_numpy(mask.astype(np.int64))


WHITE = Photos([np.full((5, 7, 3), 250, np.uint8)])


def test_only_the_synthetic_part_of_a_mixture_is_styled():
    schedule = MixedSchedule(Mixture(Pictures(3, 10), Pictures(4, 100), 0.5), whole, 40, 3, style=Style(WHITE, "color", 1.0))
    for i in range(40):
        image, mask = schedule[i]
        real = schedule.draw(i)[0] < 3
        assert (mask == 1).all() and (image < 20).all() if real else (image == 250).all()
    assert {schedule.draw(i)[0] < 3 for i in range(40)} == {True, False}


def test_without_a_style_a_draw_is_as_ever():
    for i in range(20):
        plain = Schedule(Pictures(4, 100), whole, 20, 3)[i][0]
        assert (plain < 110).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_training_draws_the_same_styles(workers):
    def batches(step, workers=0):
        style = Style(Photos(picture(9, 9, seed=i) for i in range(4)), "fourier", 0.5, 0.2)
        data = SegmentationData(Pictures(5, 100), None, whole, None, 3, workers, seed=1, style=style)
        data.trainer = SimpleNamespace(
            max_steps=6, global_step=step, world_size=1, global_rank=0, accumulate_grad_batches=1,
        )  # fmt: skip
        return [images for images, _ in data.train_dataloader()]

    first = batches(0)
    assert all(torch.equal(a, b) for a, b in zip(batches(2, workers), first[2:], strict=True))
    styled = [not torch.equal(i, i[:1, :1, :1].expand_as(i)) for batch in first for i in batch]
    assert 0 < sum(styled) < len(styled)


def test_validation_images_are_not_styled():
    data = SegmentationData(
        Pictures(5, 100), Pictures(2, 30), whole, lambda x: torch.from_numpy(x.copy()), 3, style=Style(WHITE, "color", 1.0)
    )
    data.trainer = SimpleNamespace(world_size=1, global_rank=0)
    (images, _), *_ = data.val_dataloader()
    assert [int(i.max()) for i in images] == [30, 31]


# Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "colour"}, r"style.kind='colour'; allowed: color, fourier, and style=off"),
        ({"kind": "color", "share": 0}, r"style.share=0: expected a number above 0 and at most 1"),
        ({"kind": "color", "share": 1.5}, r"style.share=1.5"),
        ({"kind": "color", "share": True}, r"style.share=True"),
        ({"kind": "fourier"}, r"style.bandwidth=None: expected a number above 0 and at most 0.5"),
        ({"kind": "fourier", "bandwidth": 0.6}, r"style.bandwidth=0.6"),
        ({"kind": "fourier", "bandwidth": float("nan")}, r"style.bandwidth=nan"),
        ({"kind": "color", "bandwidth": 0.1}, r"style.bandwidth=0.1 belongs to style=fourier"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(ValueError, match=message):
        Style(WHITE, **given)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare_shapes(root, {"train": 5, "tune": 2, "test": 1})
    write_json(root / "shapes/SegmentationClass/masks.json", {"identity": {"settings": {"power": 4}}, "chosen_on": []})
    return root


def training(data_root, *overrides):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        given = ["experiment=shapes_synthetic", f"data_root={data_root}", f"synthetic={data_root}/shapes", *overrides]
        return hydra.compose("train", overrides=given)


def recorded(data_root, *overrides):
    cfg = training(data_root, *overrides)
    images, tune = config.training_sets(cfg)
    return config.training_record(cfg, images, tune, style=config.training_style(cfg))


def test_a_run_records_its_style_and_one_without_is_what_it_was(data_root):
    photos = f"unlabelled.images={data_root}/shapes_shift/JPEGImages"
    identity, record = recorded(data_root)
    assert "style" not in json.dumps([identity, record]) and recorded(data_root, photos) == (identity, record)
    styled, told = recorded(data_root, photos, "style=fourier")
    assert json.loads(json.dumps(styled)) == styled
    files = Unlabelled(data_root / "shapes_shift/JPEGImages")
    assert told["trained_on"]["style"] == {
        "kind": "fourier", "share": 0.5, "bandwidth": 0.05, "photographs": files.fingerprint(),
    }  # fmt: skip
    assert told["supervision"] == record["supervision"] == "B"  # the benchmark's own recipe
    assert told["chosen_on"] == record["chosen_on"]  # photographs add no label
    assert {k: v for k, v in styled["trained_on"].items() if k != "style"} == identity["trained_on"]
    others = ("style.bandwidth=0.1", "style.share=0.25", "style=color", f"unlabelled.images={data_root}/shapes/JPEGImages")
    found = [recorded(data_root, photos, "style=fourier", other)[0]["trained_on"]["style"] for other in others]
    assert len({json.dumps(x) for x in [*found, told["trained_on"]["style"]]}) == 5


def test_a_study_that_was_begun_before_there_were_styles_is_the_same(data_root):
    before = config.study_identity(training(data_root), {})
    assert not {"style", "unlabelled", "self_training", "batch_norm"} & before.keys()
    assert config.study_identity(training(data_root, "style=color", "unlabelled.images=photos"), {}) != before


def test_what_a_style_needs(data_root):
    photos = f"unlabelled.images={data_root}/shapes_shift/JPEGImages"
    with pytest.raises(ValueError, match=r"style=color needs photographs of the site: unlabelled.images="):
        config.training_style(training(data_root, "style=color"))
    with pytest.raises(ValueError, match=r"style=fourier changes synthetic images, and source=real has none"):
        config.training_style(training(data_root, "style=fourier", "source=real", photos))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        config.training_style(training(data_root, "style=fourier", "unlabelled.images=nowhere"))
    with pytest.raises(ValueError, match=r"style.bandwidth=0.7"):
        config.training_style(training(data_root, "style=fourier", photos, "style.bandwidth=0.7"))
    with pytest.raises(ValueError, match="allowed: kind"):
        config.check_overrides("train", ["experiment=shapes_synthetic", "style.share=0.2"])


def test_a_training_with_a_style_from_the_command_line(data_root, run, tmp_path):
    def train(name, *more):
        run(
            "train", "experiment=shapes_synthetic", f"data_root={data_root}", f"synthetic={data_root}/shapes", "batch_size=2",
            "scale=64", "trainer.max_steps=2", "trainer.enable_progress_bar=false", "device=cpu", f"output_root={tmp_path}",
            f"name={name}", *more,
        )  # fmt: skip
        return torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    photos = f"unlabelled.images={data_root}/shapes_shift/JPEGImages"
    first, again, plain = train("a", "style=color", photos), train("b", "style=color", photos), train("c")
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], plain[k]) for k in first)
    assert read_json(tmp_path / "a/run.json")["trained_on"]["style"]["kind"] == "color"
