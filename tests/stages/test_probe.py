import numpy as np
import pytest

from dd.data.datasets import SegmentationFolder
from dd.masks.from_heat import MaskSettings
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.probe import probe, real_heat, score
from dd.store.provenance import read_json
from dd.taxonomy import taxonomy
from tests.fakes import RandomGenerator

SHAPES = taxonomy("shapes")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("data"), {"train": 1, "tune": 5, "test": 5})[0]


class Knowing(RandomGenerator):
    """A generator whose 'attention' is the exact mask (power 1), and noise (power 0)."""

    def __init__(self, data):
        self.masks = {data[i][0].tobytes(): data[i][1] for i in range(len(data))}
        self.prompts, self.batches = [], []

    size = 128

    def identity(self):
        return {**super().identity(), "model": "knowing"}

    def read_real(self, images, samples, timesteps, seed=0):
        self.batches.append(len(images))
        self.prompts += [s.prompt for s in samples]
        heat = []
        for image, sample in zip(images, samples, strict=True):
            mask, rng = self.masks[image.tobytes()], np.random.default_rng(sample.seed)
            exact = np.stack([mask == value for value in sample.class_ids])
            heat.append({"class_prompt": np.stack([rng.random(exact.shape), exact], 1)})
        return heat


def test_exact_attention_scores_100_and_noise_does_not(root, tmp_path):
    data = SegmentationFolder(root, "test", SHAPES)
    found = {
        p: probe(
            tmp_path / f"{p}.json",
            Knowing(data),
            data,
            MaskSettings(power=p, threshold=0.5, band=0.1),
            [50],
        )
        for p in (0, 1)
    }
    assert found[1]["miou"] == 100.0 and found[0]["miou"] < 50
    assert found[1] == read_json(tmp_path / "1.json")
    assert (
        found[1]["num_images"] == 5
        and found[1]["timesteps"] == [50]
        and found[1]["split"] == "test"
    )


def test_settings_are_searched_on_the_tune_split_alone(root, tmp_path):
    results = {}
    for split in ("tune", "test"):
        data = SegmentationFolder(root, split, SHAPES)
        results[split] = probe(
            tmp_path / "p.json",
            Knowing(data),
            data,
            MaskSettings(power=1, threshold=0.5, band=0.1),
            [50],
        )
    assert "grid" not in results["test"]
    grid = results["tune"]["grid"]
    assert {k.split(",")[0] for k in grid} == {"power=0", "power=1"} and grid[
        "power=1,threshold=0.5"
    ] == 100.0


def test_what_a_power_changes_is_measured_beside(root, tmp_path):
    data = SegmentationFolder(root, "test", SHAPES)
    found = probe(
        tmp_path / "p.json",
        Knowing(data),
        data,
        MaskSettings(power=0, threshold=0.5, band=0.1),
        [50],
    )
    assert found["ablations"] == {"power=1": 100.0}


def test_a_finished_probe_is_kept_and_another_one_is_made(root, tmp_path):
    data = SegmentationFolder(root, "test", SHAPES)
    first, again, other = Knowing(data), Knowing(data), Knowing(data)
    for generator, append in ((first, True), (again, True), (other, False)):
        found = probe(
            tmp_path / "p.json",
            generator,
            data,
            MaskSettings(power=1, threshold=0.5, band=0.1),
            [50],
            append,
        )
        assert found["append"] is append and found["miou"] == 100.0
    assert first.batches == other.batches == [5] and again.batches == []


def test_uncertain_pixels_are_not_hidden(root):
    data = SegmentationFolder(root, "test", SHAPES)
    heat = real_heat(Knowing(data), data, [50])
    wide, narrow = (
        score(heat, data, MaskSettings(power=0, threshold=0.6, band=band)) for band in (0.5, 0.0)
    )
    assert wide.tolist() == narrow.tolist() and int(wide.sum()) == 5 * 128 * 128


def test_the_images_are_shown_with_their_own_captions(root):
    data, generator = SegmentationFolder(root, "test", SHAPES), None
    for append in (True, False):
        generator = Knowing(data)
        heat = real_heat(generator, data, [50], batch_size=2, append=append, limit=3)
        assert generator.batches == [2, 1] and [s.id for s, _ in heat] == data.ids[:3]
        assert all((";" in prompt) == append for prompt in generator.prompts)
