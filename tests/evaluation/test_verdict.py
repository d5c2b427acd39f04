"""The sentences of the verdict, each from made-up numbers."""

from dataclasses import replace

import pytest

from dd.evaluation.statistics import Interval
from dd.evaluation.verdict import Facts, Gain, verdict

ALONE = Interval(84.1, 83.2, 85.0, None, 3, 3, 512)
WORTH = {
    "runs": [{"seed": s, "draw": None, "low": n, "high": n} for s, n in enumerate((60, 71, 80))],
    "median": {"low": 71.0, "high": 71.0},
    "range": {"low": 60.0, "high": 80.0},
    "interval": {"low": 55.0, "high": 96.0},
    "falls_again": 0,
    "shown": True,
}


def gain(k, value, half=1.0, p=0.001, seeds=3, images=512):
    return Gain(k, Interval(value, value - half, value + half, p, seeds, seeds, images), p)


FACTS = Facts(
    "shapes",
    512,
    ALONE,
    gain(16, 9.0),
    WORTH,
    [gain(16, 12.0), gain(64, 3.9), gain(256, 0.2, p=0.6)],
)


def told(facts, several=False):
    found = verdict(facts, several)
    return found.outcome, " ".join([*found.findings, found.verdict])


def test_worth_it_is_said_with_every_interval_and_n():
    assert told(FACTS) == (
        "worth it",
        "On 512 test images and 3 seeds, synthetic images alone reach a mIoU of 84.1 [83.2, 85.0], "
        "as much as 71 [55, 96] labelled photographs. Added to 16 labels: +12.0 [11.0, 13.0]; to "
        "64 labels: +3.9 [2.9, 4.9]; from 256 labels on no gain is shown. "
        "Verdict: worth it up to 64 labels.",
    )


def test_a_gain_up_to_the_last_point_says_that_more_was_not_measured():
    outcome, text = told(replace(FACTS, gains=FACTS.gains[:2]))
    assert outcome == "worth it" and text.endswith(
        "to 64 labels: +3.9 [2.9, 4.9]. Verdict: worth it up to 64 labels, the most that were "
        "measured."
    )


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ((0, 5, 5, 0), "with 64 to 256 labels"),
        ((0, 5, 0, 0), "with 64 labels"),
        ((5, 0, 5, 0), "with 16 and 256 labels"),
        ((5, 0, 0, 0), "up to 16 labels"),
    ],
)
def test_gains_are_claimed_where_they_are_shown_alone(values, where):
    gains = [gain(k, v or 0.1) for k, v in zip((16, 64, 256, 1024), values, strict=True)]
    assert told(replace(FACTS, gains=gains))[1].endswith(f"Verdict: worth it {where}.")


def test_not_worth_it():
    facts = replace(FACTS, fewest=gain(16, -5.0), gains=[gain(16, 0.2), gain(64, -0.3)])
    assert told(facts) == (
        "not worth it",
        "On 512 test images and 3 seeds, synthetic images alone reach a mIoU of 84.1 [83.2, 85.0], "
        "less than 16 labelled photographs alone (−5.0 [−6.0, −4.0]). With 16 to 64 labels no gain "
        "over these alone is shown (the largest is +0.2 [−0.8, 1.2] with 16). "
        "Verdict: do not use them: 16 labels alone are better.",
    )
    lost = replace(FACTS, fewest=gain(16, 0.2), gains=[gain(16, -2.0)])
    outcome, text = told(lost)
    assert outcome == "not worth it" and "Added to 16 labels: −2.0 [−3.0, −1.0]." in text
    assert text.endswith("do not use them: 16 labels alone are better than with synthetic images.")


def test_gains_with_labels_do_not_hide_that_alone_they_are_worse():
    outcome, text = told(replace(FACTS, fewest=gain(16, -5.0)))
    assert outcome == "worth it" and text.endswith(
        "Verdict: worth it up to 64 labels, but not alone: 16 labels alone are better."
    )


def test_a_gain_and_a_later_loss_are_both_said():
    outcome, text = told(replace(FACTS, gains=[gain(16, 12.0), gain(64, -3.0)]))
    assert outcome == "worth it" and text.endswith("Verdict: worth it up to 16 labels.")
    assert "Added to 16 labels: +12.0 [11.0, 13.0]; to 64 labels: −3.0 [−4.0, −2.0]." in text


def test_an_interval_that_holds_0_shows_nothing():
    facts = replace(FACTS, fewest=gain(16, 0.8), gains=[gain(16, 0.9)])
    outcome, text = told(facts)
    assert outcome == "not shown" and "as much as" not in text
    assert "; no difference to 16 labelled photographs alone is shown (+0.8 [−0.2, 1.8])." in text
    assert "With 16 labels no gain over these alone is shown (+0.9 [−0.1, 1.9])." in text
    assert "Verdict: not shown, for every interval holds 0" in text


def test_a_difference_of_too_few_seeds_is_not_called_none():
    few = {"seeds": 2}
    facts = replace(FACTS, fewest=gain(16, 5.0, **few), gains=[gain(16, 4.0, **few)])
    outcome, text = told(facts)
    assert outcome == "too few" and "no difference" not in text and "no gain" not in text
    assert "; the difference to 16 labelled photographs alone is +5.0 [4.0, 6.0], which" in text
    assert "With 16 labels, the difference to these alone is +4.0 [3.0, 5.0]; it decides" in text
    facts = replace(facts, gains=[gain(16, 4.0, **few), gain(64, 3.0, **few)])
    text = told(facts)[1]
    assert (
        "With 16 to 64 labels, the largest difference to these alone is +4.0 [3.0, 5.0] wit" in text
    )


def test_a_p_value_that_holm_raised_shows_nothing():
    outcome, text = told(replace(FACTS, fewest=None, gains=[gain(16, 3.0, p=0.051)]))
    assert outcome == "not shown" and "no gain over these alone is shown (+3.0 [2.0, 4.0])" in text


@pytest.mark.parametrize(
    ("images", "seeds", "said"),
    [
        (5, 3, "5 test images are too few to decide; label 25 more."),
        (1, 3, "1 test image is too few to decide; label 29 more."),
        (512, 1, "1 paired seed is too few to decide; train 2 more (seed=...)."),
        (
            5,
            2,
            "5 test images and 2 paired seeds are too few to decide; label 25 more, and train 1 "
            "more (seed=...).",
        ),
    ],
)
def test_too_little_decides_nothing_however_large_the_gain(images, seeds, said):
    many = [gain(16, 40.0, seeds=seeds, images=images)]
    facts = replace(FACTS, images=images, gains=many, fewest=replace(many[0]))
    outcome, text = told(facts)
    assert outcome == "too few" and text.endswith(f"Verdict: {said}")
    assert "as much as" not in text and "worth it" not in text


def test_one_seed_has_no_interval_without_images():
    one = Interval(84.1, None, None, None, 1, 1, None)
    pair = Gain(16, Interval(3.0, None, None, None, 1, 1, None), None)
    outcome, text = told(replace(FACTS, alone=one, fewest=pair, gains=[pair]))
    assert outcome == "too few" and "84.1 (no interval)" in text and "+3.0 (no interval)" in text


def test_scores_of_the_images_that_are_not_stored_decide_nothing():
    pairs = [gain(16, 9.0, images=None)]
    outcome, text = told(replace(FACTS, fewest=pairs[0], gains=pairs))
    assert outcome == "too few" and text.endswith("decided; evaluate the runs again.")


def test_no_control():
    facts = replace(FACTS, fewest=None, worth=None, gains=[], control=False)
    outcome, text = told(facts)
    assert outcome == "no control" and "labelled photographs" not in text
    assert text.endswith(
        "Verdict: unknown, for no real-only control was trained (train.py source=real shots=...)."
    )


def test_only_images_alone_are_worth_the_labels_they_were_tested_against():
    outcome, text = told(replace(FACTS, gains=[]))
    assert outcome == "worth it" and text.endswith("Verdict: worth it in place of 16 labels.")
    outcome, text = told(replace(FACTS, gains=[gain(16, 0.5)]))
    assert text.endswith("worth it in place of 16 labels; on top of labels no gain is shown.")


def test_no_synthetic_run_has_no_verdict():
    assert told(Facts("shapes", 512)) == (
        "nothing",
        "Verdict: none, for no run here was trained on synthetic images.",
    )


def test_several_domains_are_named_and_whose_labels_they_are():
    text = told(replace(FACTS, domain="shapes_shift", labels_of="shapes"), several=True)[1]
    assert text.startswith("On 512 test images of shapes_shift and 3 seeds, synthetic")
    assert "as much as 71 [55, 96] labelled photographs of shapes." in text


@pytest.mark.parametrize(
    ("supervision", "labels", "said"),
    [
        ("B", 896, "Supervision B: 896 labels chose settings, and come on top."),
        ("A/B", None, "Supervision A/B: which labels chose settings is not recorded."),
        ("D", 0, "Supervision D: a foundation model made the masks."),
        ("real", 0, "Supervision real: whole real splits were trained on."),
    ],
)
def test_a_class_of_supervision_other_than_a_is_said(supervision, labels, said):
    text = told(replace(FACTS, supervision=supervision, labels=labels))[1]
    assert f"{said} Verdict:" in text
    assert "Supervision" not in told(FACTS)[1]


def test_worth_beyond_what_was_measured_is_a_bound():
    bound = {"low": 512.0, "high": None}
    worth = WORTH | {"median": bound, "range": {"low": 300.0, "high": None}, "interval": None}
    text = told(replace(FACTS, worth=worth))[1]
    assert "as much as at least 512 (runs: 300 or more) labelled photographs." in text


def test_fewer_seeds_than_the_first_sentence_says_are_said():
    few = [gain(16, 12.0), gain(64, 3.9, seeds=2)]
    outcome, text = told(replace(FACTS, gains=few))
    assert outcome == "worth it" and text.endswith("worth it up to 16 labels.")
