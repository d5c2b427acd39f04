"""Signals against cases worked out by hand, rules and their refusals, CLIP scores of a tiny
random CLIP."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from dd.data.quality import (
    ClipScore,
    Rule,
    clip_signals,
    heat_signals,
    judge,
    mask_signals,
    read_rules,
    refuse_excess,
)

# Signals


def test_signals_of_heat_by_hand():
    one_cell, flat, halves = (
        [[0, 0], [0, 0.5]],
        [[0.25, 0.25], [0.25, 0.25]],
        [[0.4, 0.4], [0.1, 0.1]],
    )
    found = heat_signals(np.array([[one_cell, flat], [halves, np.zeros((2, 2))]], np.float16))
    assert found["peak"] == [[0.5, 0.25], [pytest.approx(0.4, abs=1e-4), 0.0]]
    assert found["spread"] == [[0.5, 0.0], [pytest.approx(0.3, abs=2e-4), 0.0]]
    assert found["area"] == [[0.25, 1.0], [0.5, 1.0]]
    p = [0.4, 0.4, 0.1, 0.1]
    by_hand = -sum(v * math.log(v) for v in p) / math.log(4)
    assert found["entropy"] == [[0.0, 1.0], [pytest.approx(by_hand, abs=1e-3), 1.0]]


def test_half_of_the_peak_counts_and_signals_are_plain_numbers_of_six_digits():
    found = heat_signals(np.array([[[[1.0, 0.5], [0.4999, 1 / 3]]]]))
    assert found["area"] == [[0.5]] and found["spread"] == [[0.666667]]
    assert json.loads(json.dumps(found)) == found


def test_signals_of_a_mask_by_hand():
    mask = np.array([[0, 0, 255, 3], [7, 0, 0, 255]], np.uint8)
    assert mask_signals(mask, [3, 7, 9]) == {
        "uncertain": 0.25,
        "foreground": 0.25,
        "share": [0.125, 0.125, 0.0],
        "missing": 1,
    }
    assert mask_signals(mask, [3, 9], absent=[9]) == {
        "uncertain": 0.25,
        "foreground": 0.25,
        "share": [0.125, None],
        "missing": 0,
    }


# Rules


def sample(number, *classes):
    return SimpleNamespace(id=f"{number:06d}", classes=classes)


SAMPLES = [sample(i, "apple") for i in range(4)] + [sample(4, "ring", "apple"), sample(5, "ring")]


def signals(values):
    """Of each sample: ``values`` as its peaks at power 1; power 0 holds what no rule must read
    by mistake."""
    return [{"heat": {"class_prompt": {"peak": [[9.0, v] for v in row]}}} for row in values]


PEAKS = signals([[0.1], [0.2], [0.3], [0.4], [0.01, 0.5], [0.02]])


def hits(rule, found=PEAKS, **kwargs):
    result = judge(rule, SAMPLES, found, **{"power": 1, **kwargs})
    return {int(i): [hit["class"] for hit in rows] for i, rows in result["hits"].items()}


def test_an_absolute_bound_is_strict_and_sees_every_class():
    assert hits(Rule("r", "drop", "peak", below=0.1)) == {4: ["ring"], 5: ["ring"]}
    assert hits(Rule("r", "drop", "peak", above=0.4)) == {4: ["apple"]}
    assert hits(Rule("r", "absent", "peak", above=9, power=0)) == {}
    assert list(hits(Rule("r", "absent", "peak", above=8, power=0))) == [0, 1, 2, 3, 4, 5]


def test_a_percentile_is_that_of_the_class():
    result = judge(Rule("r", "absent", "peak", below_percentile=50), SAMPLES, PEAKS, power=1)
    assert result["thresholds"] == {"apple": pytest.approx(0.3), "ring": pytest.approx(0.015)}
    assert {int(i): [h["class"] for h in rows] for i, rows in result["hits"].items()} == {
        0: ["apple"],
        1: ["apple"],
        4: ["ring"],
    }
    assert result["hits"]["000004"] == [
        {"class": "ring", "value": 0.01, "threshold": pytest.approx(0.015)}
    ]
    assert hits(Rule("r", "drop", "peak", above_percentile=75)) == {4: ["apple"], 5: ["ring"]}


def test_equal_values_are_beyond_no_percentile():
    assert (
        hits(
            Rule("r", "drop", "peak", below_percentile=99),
            signals([[1.0]] * 4 + [[1.0, 1.0], [1.0]]),
        )
        == {}
    )


def test_signals_of_a_sample_are_compared_over_all_samples():
    found = [
        {"mask": {"uncertain": v, "share": [None] * len(s.classes)}}
        for v, s in zip((0, 1, 2, 3, 4, 5), SAMPLES, strict=True)
    ]
    result = judge(Rule("r", "drop", "uncertain", above_percentile=80), SAMPLES, found)
    assert result == {
        "thresholds": {"all": 4.0},
        "hits": {"000005": [{"class": "all", "value": 5, "threshold": 4.0}]},
    }
    assert (
        hits(Rule("r", "drop", "share", below=9), found) == {}
    )  # nothing is known of a class that was not drawn


def test_scores_are_read_from_their_own_place():
    found = [
        {"clip": {"by": "x", "prompt": 10 * i, "classes": [i] * len(s.classes)}}
        for i, s in enumerate(SAMPLES)
    ]
    assert list(hits(Rule("r", "drop", "clip", below=20), found)) == [0, 1]
    assert hits(Rule("r", "absent", "clip_class", above=3), found) == {
        4: ["ring", "apple"],
        5: ["ring"],
    }


def test_powers_that_are_not_there():
    with pytest.raises(
        ValueError, match="quality.rules.r: power 2 is not stored, powers 0 to 1 are"
    ):
        hits(Rule("r", "drop", "peak", below=1), power=2)
    with pytest.raises(ValueError, match=r"not made from heat; give the power, as \.power=0"):
        hits(Rule("r", "drop", "peak", below=1), power=None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"action": "delete", "signal": "peak", "below": 1}, "r.action='delete'; allowed: drop"),
        (
            {"action": "drop", "signal": "peek", "below": 1},
            "r.signal='peek'; allowed: peak, spread, entropy, area, clip, clip_cl",
        ),
        (
            {"action": "drop", "signal": "peak"},
            "needs one number for one of below, above, .*; got none",
        ),
        (
            {"action": "drop", "signal": "peak", "below": 1, "above": 0},
            "got {'below': 1, 'above': 0}",
        ),
        ({"action": "drop", "signal": "peak", "below": "1"}, "needs one number"),
        ({"action": "drop", "signal": "peak", "below": True}, "needs one number"),
        (
            {"action": "drop", "signal": "peak", "below_percentile": 0},
            "below_percentile=0: expected a percentile between 0 and",
        ),
        ({"action": "drop", "signal": "peak", "above_percentile": 100}, "expected a percentile"),
        (
            {"action": "absent", "signal": "share", "below": 1},
            "share is not known of a class before the masks are drawn",
        ),
        ({"action": "absent", "signal": "clip", "below": 1}, "clip is not known of a class"),
        (
            {"action": "drop", "signal": "uncertain", "above": 1, "power": 0},
            "r.power=0: expected a stored power",
        ),
        ({"action": "drop", "signal": "peak", "above": 1, "power": 0.5}, "r.power=0.5"),
        ({"action": "drop", "signal": "peak", "bellow": 1}, "'bellow'.*keys: .*'below'"),
        ({"signal": "peak", "below": 1}, "expected action, signal and a bound"),
        ("drop", "expected action, signal and a bound"),
    ],
)
def test_rules_that_make_no_sense(rule, message):
    with pytest.raises(ValueError, match=message) as error:
        read_rules({"r": rule})
    assert "quality.rules.r" in str(error.value)


def test_rules_are_read_by_name_and_written_as_given():
    given = {"b": {"action": "drop", "signal": "peak", "below": 1, "power": 0}, "a": None}
    (rule,) = read_rules(given)
    assert rule.name == "b" and rule.settings() == given["b"]
    assert read_rules({}) == []


# Refusals


LOST = {"000000": ["apple"], "000001": ["apple"], "000002": ["apple"], "000005": ["ring"]}


def test_more_than_the_stated_share_is_refused_with_the_numbers():
    with pytest.raises(
        ValueError,
        match=r"the rule would take out 4 of 6 samples \(67 %\), more than .*max_share=0.5",
    ) as error:
        refuse_excess("the rule", SAMPLES, LOST, 0.5, "drop")
    assert "apple 3 of 5, ring 1 of 2" in str(error.value)
    with pytest.raises(ValueError, match=r"4 of 7 classes that were asked for \(57 %\)"):
        refuse_excess("the rule", SAMPLES, LOST, 0.5, "absent")
    refuse_excess("the rule", SAMPLES, LOST, 4 / 6, "drop")


def test_a_whole_class_is_refused_whatever_its_share():
    lost = {"000004": ["ring"], "000005": ["ring"]}
    with pytest.raises(
        ValueError, match=r"2 of 6 samples \(33 %\), and with them every image of ring\."
    ):
        refuse_excess("the rule", SAMPLES, lost, 1, "drop")


@pytest.mark.parametrize("share", [0, 1.5, "half", True])
def test_impossible_shares(share):
    with pytest.raises(ValueError, match="quality.max_share="):
        refuse_excess("the rule", SAMPLES, {}, share, "drop")


# CLIP


@pytest.fixture(scope="module")
def folder(tiny_clip, tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return ClipScore(str(folder))


IMAGE = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
TEXTS = ["a photo of an apple", "a gold ring", "a pine tree and an apple"]


def test_scores_are_those_of_the_model_itself(folder, clip):
    model, tokenizer = (
        CLIPModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    square = np.asarray(Image.fromarray(IMAGE).crop((0, 4, 32, 36)), np.float64) / 255
    pixels = torch.tensor(
        (square - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4], dtype=torch.float32
    ).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = [
            model(
                **tokenizer(text, return_tensors="pt"), pixel_values=pixels
            ).logits_per_image.item()
            for text in TEXTS
        ]
    cosines = np.array(logits) / model.logit_scale.exp().item()
    assert clip(IMAGE, TEXTS) == pytest.approx(np.maximum(100 * cosines, 0), abs=1e-2)
    assert len(set(clip(IMAGE, TEXTS))) > 1 and clip(IMAGE, TEXTS) == clip(IMAGE, TEXTS)


@torch.no_grad()
def test_the_matching_text_has_the_highest_score(folder):
    clip = ClipScore(str(folder))
    tokens = clip.tokenizer(TEXTS[1], return_tensors="pt")
    wanted = clip.model.get_text_features(**tokens).pooler_output[0]
    pixels = clip.processor(images=[IMAGE], return_tensors="pt", input_data_format="channels_last")[
        "pixel_values"
    ]
    pooled = clip.model.vision_model(pixels).pooler_output[0]
    matching = torch.outer(wanted, pooled) / pooled.square().sum()
    clip.model.visual_projection.weight.copy_(matching)  # the image "is" a gold ring
    scores = clip(IMAGE, TEXTS)
    assert scores[1] == pytest.approx(100, abs=1e-2) and max(scores[0], scores[2]) < 99.9
    clip.model.visual_projection.weight.neg_()
    assert clip(IMAGE, TEXTS)[1] == 0


def test_scores_of_a_sample_name_the_model(clip):
    found = clip_signals(clip, IMAGE, TEXTS[2], ["apple", "gold ring"])
    assert [found["prompt"], *found["classes"]] == clip(
        IMAGE, [TEXTS[2], "a photo of a apple", "a photo of a gold ring"]
    )
    assert found["by"] == clip.weights_sha256[:16] and json.loads(json.dumps(found)) == found


def test_a_text_that_is_too_long_is_cut(clip):
    assert len(clip(IMAGE, ["a gold ring " * 100])) == 1


def test_other_weights_are_another_model(folder, clip, tiny_clip, tmp_path):
    assert ClipScore(str(folder)).weights_sha256 == clip.weights_sha256
    assert ClipScore(str(tiny_clip(tmp_path, seed=1))).weights_sha256 != clip.weights_sha256


def copy(folder, target, *without):
    for file in folder.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return json.loads((target / "config.json").read_text())


def test_pickles_are_refused(folder, tmp_path):
    copy(folder, tmp_path, "model.safetensors")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        ClipScore(str(tmp_path))


def test_other_models_and_code_of_a_repository_are_refused(folder, tmp_path):
    config = copy(folder, tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "siglip", "architectures": ["SiglipModel"]})
    )
    with pytest.raises(
        ValueError, match="could not be loaded: it is a model of type 'siglip', expected clip"
    ):
        ClipScore(str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="could not be loaded"):
        ClipScore(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_half_a_clip_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy(folder, tmp_path)
    weights = {
        k: v for k, v in load_file(folder / "model.safetensors").items() if "projection" not in k
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="its weights lack 2 of CLIP's"):
        ClipScore(str(tmp_path))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/clip", "clip"])
def test_no_such_folder(model):
    with pytest.raises(FileNotFoundError, match="no such folder. Give a local folder"):
        ClipScore(model)


def test_an_unknown_dtype(folder):
    with pytest.raises(ValueError, match="quality.clip.dtype='int8'; allowed: float32"):
        ClipScore(str(folder), dtype="int8")
