"""What labels decided: the record of a choice, whose labels it counts, and the class that
follows."""

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dd import config
from dd.evaluation.supervision import (
    behind,
    choices,
    class_of_masks,
    declared,
    distinct,
    label_set,
    merged,
    override,
    strongest,
    supervision,
    told,
    trained_labels,
)

TUNE = {"data": "shapes", "split": "tune", "labels": 128}
MASKS = {"what": "masks", "data": "shapes/tune", "labels": 128}


def compose(root, *overrides):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return hydra.compose(root, overrides=list(overrides))


# The record


def test_a_choice_is_declared_in_one_form():
    assert choices("masks", TUNE) == choices("masks", [TUNE]) == [MASKS]
    assert choices("masks", None) == choices("masks", []) == []
    drawn = {**TUNE, "split": "train", "labels": 16, "seed": 3}
    assert choices("rate", [TUNE, drawn])[1] == {
        "what": "rate",
        "data": "shapes/train",
        "labels": 16,
        "seed": 3,
    }
    assert declared(choices("rate", [TUNE, drawn])) == [TUNE, drawn]


@pytest.mark.parametrize(
    "given",
    [
        "shapes/tune",
        128,
        [128],
        {"data": "shapes", "labels": 128},
        {**TUNE, "labels": 0},
        {**TUNE, "labels": "all"},
        {**TUNE, "split": None},
        {**TUNE, "seeds": 1},
        {**TUNE, "seed": "0"},
        {**TUNE, "labels": True},
    ],
)
def test_another_form_is_refused(given):
    with pytest.raises(
        ValueError,
        match=r"chosen_on of masks: got .*; expected \{data: shapes, split: tune, labels: 128\}",
    ):
        choices("masks", given)


def test_a_record_can_be_given_on_the_command_line():
    odd = [label_set("my site/hand's pick", 3), label_set("shapes/train", 16, 0)]
    cfg = compose("train", "experiment=shapes_synthetic", override("chosen_on.learning_rate", odd))
    found = [c for c in config.chosen_on(cfg) if c["what"] == "learning_rate"]
    assert found == [
        {"what": "learning_rate", **one} for one in odd
    ]  # in place of the experiment's own
    assert override("chosen_on.rate", []) == "++chosen_on.rate=[]"
    with pytest.raises(ValueError, match="expected {what was chosen: label sets}"):
        config.chosen_on(OmegaConf.create({"chosen_on": [TUNE]}))


# Counting


def test_each_set_is_counted_once():
    train = [
        label_set("a/train", 16, 0),
        label_set("a/train", 64, 0),
        label_set("a/tune", 128),
        MASKS,
        MASKS,
    ]
    assert distinct(train) == 64 + 128 + 128
    assert distinct([*train, label_set("a/train", 16, 1)]) == 80 + 128 + 128  # another draw
    assert (
        distinct([*train, label_set("a/train", 16, 1), label_set("a/train", 768)])
        == 768 + 128 + 128
    )  # holds them all
    assert distinct([]) == 0 and distinct([label_set("a/train", None)]) is None
    assert merged([MASKS], None, [MASKS, TUNE]) == [MASKS, TUNE]


def test_sets_in_words():
    rate = {**MASKS, "what": "learning_rate"}
    assert (
        told([MASKS, rate, label_set("a/b", 3, 1)])
        == "128 labels of shapes/tune (masks, learning_rate), 3 of a/b"
    )
    assert told([]) == "" and told([label_set("a/b", None)]) == "all labels of a/b"


# What was trained on


def real(shots, images=768, after=None, seed=0, **more):
    return {
        "source": "real",
        "data": "voc",
        "root": "VOC2012",
        "split": "train",
        "images": images,
        "shots": shots,
        "seed": seed,
        "after": after,
        **more,
    }


def synthetic(after=None, **masks):
    return {
        "source": "synthetic",
        "root": "set",
        "split": "train",
        "images": 5,
        "shots": None,
        "seed": 0,
        "mask_settings": masks,
        "after": after,
    }


def test_trained_labels_are_those_of_all_that_a_run_builds_on():
    assert trained_labels(real("all")) == [label_set("voc/train", 768)]
    assert trained_labels(real(16, images=12, hold_out=4)) == [label_set("voc/train", 16, 0)]
    assert trained_labels(real("all", images=700, hold_out=68)) == [label_set("voc/train", 768)]
    mixed = {
        "source": "mixed",
        "data": "site",
        "shots": 4,
        "seed": 2,
        "after": synthetic(teacher={"trained_on": real(16)}),
        "real": {"root": "x", "split": "train", "images": 4},
        "synthetic": {"mask_settings": {}},
    }
    assert trained_labels(mixed) == [label_set("site/train", 4, 2), label_set("voc/train", 16, 0)]
    assert trained_labels(synthetic()) == trained_labels(None) == []


def test_what_is_behind_a_mask_set():
    masks = {"identity": {"teacher": {"trained_on": real(16)}}, "chosen_on": [MASKS]}
    assert (
        behind(masks) == [label_set("voc/train", 16, 0), MASKS] and behind({"identity": {}}) == []
    )


# The class


@pytest.mark.parametrize(
    ("trained_on", "chosen", "before", "expected"),
    [
        (synthetic(), [], None, "A"),
        (synthetic(), [MASKS], None, "B"),
        (synthetic(teacher={"trained_on": synthetic()}), [MASKS], None, "B"),
        (synthetic(after=synthetic()), [MASKS], "B", "B"),
        (real(16), [MASKS], None, "real"),  # real images alone stay real
        (real("all"), [MASKS], "real", "real"),
        (real(16, after=synthetic()), [], "A", "A"),
        (real(16, after=synthetic()), [MASKS], "A", "B"),  # its own rate was chosen by labels
        (real("all", after=synthetic()), [MASKS], "B", "B"),
    ],
)
def test_a_label_that_chose_anything_makes_b(trained_on, chosen, before, expected):
    assert supervision(trained_on, chosen, before) == expected


def labelled(supervision, **more):
    return {"labeler": {"name": "x", "supervision": supervision, **more}}


def mixed_with(masks, shots):
    return {**synthetic(), "source": "mixed", "shots": shots, "synthetic": {"mask_settings": masks}}


D, C = labelled("D"), labelled("C")


def joined(*identities):
    sets = [{"set": f"masks/{i}", "identity": m, "masks": "0"} for i, m in enumerate(identities)]
    return labelled("D", sets=sets)


@pytest.mark.parametrize(
    ("trained_on", "chosen", "before", "expected"),
    [
        (synthetic(**D), [], None, "D"),
        (synthetic(**D), [MASKS], None, "D"),
        (synthetic(**labelled("A")), [], None, "A"),
        (synthetic(**labelled("A")), [MASKS], None, "B"),
        (synthetic(**labelled("B")), [], None, "B"),
        (synthetic(teacher={"trained_on": synthetic(**D)}), [], None, "D"),  # a student's student
        (synthetic(after=synthetic(**D)), [], "D", "D"),
        (real(16, after=synthetic(**D)), [MASKS], "D", "D"),
        (synthetic(**joined({}, D)), [], None, "D"),
        (synthetic(**joined(C, D)), [], None, "C/D"),
        (synthetic(**joined({"teacher": {"trained_on": synthetic(**C)}}, {})), [], None, "C/D"),
        (mixed_with(D, 4), [], None, "D"),
        (mixed_with(D, "all"), [], None, "real"),
    ],
)
def test_the_class_of_a_labeler_goes_with_its_masks(trained_on, chosen, before, expected):
    assert supervision(trained_on, chosen, before) == expected


def test_labels_behind_joined_sets_are_counted():
    teacher = {"teacher": {"trained_on": real(16)}}
    assert trained_labels(synthetic(**joined(teacher, D))) == [label_set("voc/train", 16, 0)]


def test_the_class_of_a_mask_set():
    assert class_of_masks({"identity": D, "chosen_on": [MASKS]}) == "D"
    assert class_of_masks({"identity": {}, "chosen_on": [MASKS]}) == "B"
    assert class_of_masks({"identity": {}}) == "A"
    assert class_of_masks({"identity": {"teacher": {"trained_on": real("all")}}}) == "real"


def test_the_strongest_class():
    assert strongest(["A", "B", "A"]) == "B" and strongest(["A"]) == "A"
    assert strongest(["D", "C", "B"]) == "C/D" == strongest(["C/D", "A"])
    assert strongest(["D", "real"]) == "real"
    for wrong in ([], ["E"]):
        with pytest.raises(ValueError, match="allowed: A, B, C, D, real"):
            strongest(wrong)


# The configuration as it is shipped


def of(root, *overrides):
    cfg = compose(root, *overrides)
    return config.chosen_on(
        cfg, *(("masks", "diffusion") if root == "generate" else ("self_training",))
    )


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_the_papers_recipes_were_chosen_on_no_label_of_ours(data):
    assert of("generate", f"experiment={data}") == []
    for recipe in ("synthetic", "finetune", "mixed", "real", "budget"):
        assert of("train", f"experiment=paper_{recipe}", f"data={data}") == []


def test_the_embedded_benchmark_says_what_its_settings_were_chosen_on():
    for generator in ("embedded", "embedded_mmdit"):
        assert of("generate", "experiment=shapes", f"diffusion={generator}") == []
    for recipe in ("synthetic", "real", "mixed", "finetune", "adapt_segmenter", "adapt_labels"):
        found = of("train", f"experiment=shapes_{recipe}")
        assert {c["what"] for c in found} >= {"recipe"} and label_set("shapes/train", 768) in [
            {k: v for k, v in c.items() if k != "what"} for c in found
        ]
    rate = [c for c in of("train", "experiment=shapes_finetune") if c["what"] == "learning_rate"]
    assert rate == [
        {"what": "learning_rate", "data": "shapes/train", "labels": 64, "seed": 0},
        {**MASKS, "what": "learning_rate"},
    ]
