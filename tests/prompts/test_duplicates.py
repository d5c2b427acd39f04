"""Near-duplicates against a comparison of all pairs."""

import numpy as np
import pytest

from dd.prompts.duplicates import SeenCaptions, normalised, similar_to


def all_pairs(texts, threshold):
    """The definition itself: each text against every kept one before it."""
    sets, kept = [set(normalised(t).split()) for t in texts], []
    answers = []
    for i, words in enumerate(sets):
        near = any(len(words & sets[j]) >= threshold * len(words | sets[j]) for j in kept)
        kept += [] if near else [i]
        answers.append(near)
    return answers


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.75, 0.8, 0.99])
def test_the_index_misses_nothing(threshold):
    rng = np.random.default_rng(7)
    words = [f"w{i}" for i in range(25)]
    texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(600)] + ["", "?!"]
    answers = similar_to(texts, threshold)
    assert [a is not None for a in answers] == all_pairs(texts, threshold)
    assert 0 < sum(a is None for a in answers) < 600
    for i, a in enumerate(answers):
        if a is not None:
            mine, other = (set(normalised(texts[k]).split()) for k in (i, a))
            assert (
                a < i and answers[a] is None and len(mine & other) >= threshold * len(mine | other)
            )


def test_equal_but_for_case_and_punctuation():
    texts = [
        "A train on the tracks.",
        "a train on the tracks",
        "the tracks on a train",
        "a train, on the  tracks!",
    ]
    assert similar_to(texts, 1) == [None, 0, None, 0]
    assert similar_to(texts, 0.99) == [None, 0, 0, 0]


@pytest.mark.parametrize("threshold", [0, 0.49, 1.01, -1])
def test_impossible_thresholds(threshold):
    with pytest.raises(ValueError, match="from 0.5 to 1"):
        similar_to(["a"], threshold)


def test_many_captions_are_compared_with_few():
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(5000)])
    texts = [" ".join(words[(rng.zipf(1.3, 9) - 1) % 5000]) for _ in range(20000)]
    texts += texts[:5000]
    answers = similar_to(texts, 0.8)
    assert all(a is not None for a in answers[20000:])


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1])
def test_texts_one_after_another_give_the_same(threshold):
    rng = np.random.default_rng(8)
    texts = [
        " ".join(rng.choice([f"w{'x' * (i % 5)}{i}" for i in range(20)], rng.integers(1, 9)))
        for _ in range(400)
    ] + [
        "",
        "?",
    ]
    earlier = SeenCaptions(threshold)
    repeated = [earlier.repeats(text) for text in texts]
    assert (
        repeated == [a is not None for a in similar_to(texts, threshold)]
        and 0 < sum(repeated) < 400
    )
    with pytest.raises(ValueError, match=r"drop_similar=0\.4"):
        SeenCaptions(0.4)
