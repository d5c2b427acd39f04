"""Images, heat and prompts of the generator, for a checkpoint of Stable Diffusion and one of XL."""

import json
from itertools import chain

import numpy as np
import pytest
import torch

from dd.generators import TextToImage
from dd.generators.families import Stream
from dd.generators.text_to_image import eight_bit, faults
from dd.masks.from_heat import SOURCES
from dd.prompts.prompt import make_prompt
from dd.store.samples import make_plan
from dd.taxonomy import Taxonomy, taxonomy


def test_images_and_heat_have_their_form(made, samples, sides):
    images, heat, bad = made
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 5
    assert len(heat) == 3 and bad == [None] * 3
    for sample, maps in zip(samples, heat, strict=True):
        assert maps.keys() == set(SOURCES[:3])
        for stored in maps.values():
            assert (
                stored.shape == (len(sample.classes), 4, sides[1], sides[1])
                and stored.dtype == np.float64
            )
            assert (
                np.isfinite(stored).all()
                and (stored[:, 0].max((1, 2)) > stored[:, 0].min((1, 2))).all()
            )


def test_capture_does_not_change_a_bit_of_the_image(model, made, samples):
    images, heat, bad = model.generate(samples, capture=False)
    assert images.tobytes() == made[0].tobytes()
    assert (heat, bad) == ([], [None] * 3)


def test_the_same_seeds_give_the_same_bytes(model, made, samples):
    torch.manual_seed(99)
    images, heat, _ = model.generate(samples)
    assert images.tobytes() == made[0].tobytes()
    for a, b in zip(heat, made[1], strict=True):
        assert all(a[source].tobytes() == b[source].tobytes() for source in a)


def test_each_sample_has_its_own_noise(model, made, captions):
    twins = make_plan([make_prompt(*captions[0])] * 2, taxonomy("shapes"), 5, 2)
    images, _, _ = model.generate(twins)
    assert np.abs(images[0].astype(int) - images[1]).mean() > 1
    np.testing.assert_allclose(images[0].astype(int), made[0][0], atol=2)  # id 000000 in both plans


def test_a_sample_does_not_depend_on_its_place_in_the_batch(model, made, samples):
    for order in ([2, 0, 1], [1]):
        images, heat, _ = model.generate([samples[i] for i in order])
        for place, i in enumerate(order):
            np.testing.assert_allclose(images[place].astype(int), made[0][i], atol=2)
            for source, stored in heat[place].items():
                np.testing.assert_allclose(stored, made[1][i][source], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_without_guidance_the_batch_is_not_doubled(changed, samples, guidance):
    model, sizes = changed(guidance=guidance), []
    handle = model.pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    images, heat, _ = model.generate(samples)
    handle.remove()
    assert sizes == [3, 3]
    assert images.shape == (3, 32, 32, 3) and [len(h["class_prompt"]) for h in heat] == [2, 1, 3]


def test_a_negative_prompt_reaches_the_image(changed, made, samples):
    images, _, _ = changed(negative_prompt="a brick").generate(samples)
    assert np.abs(images.astype(int) - made[0]).mean() > 0.1


def test_an_empty_negative_prompt_is_the_models_own_nothing(model, samples, kind):
    """Of XL zeros, as its model_index.json says; of Stable Diffusion the states of an empty
    text."""
    seen = []
    handle = model.pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    model.generate(samples, capture=False)
    handle.remove()
    nothing = torch.zeros(3, 77, 72) if kind == "xl" else model.text_states([""] * 3)
    assert torch.equal(seen[0][:3], nothing)


# Bad images


def found_faults(images, heat=(), flagged=None):
    return faults(*eight_bit(torch.from_numpy(images).permute(0, 3, 1, 2))[1:], heat, flagged)


def test_faults():
    rng = np.random.default_rng(0)
    good, one_colour, broken = rng.random((4, 4, 3)), np.full((4, 4, 3), 0.2), rng.random((4, 4, 3))
    broken[1, 2, 0] = np.nan
    images = np.stack([good, one_colour, broken, good])
    assert found_faults(images) == [None, "constant", "not finite", None]
    assert found_faults(images, [], [False, False, False, True]) == [
        None,
        "constant",
        "not finite",
        "safety checker",
    ]
    heat = [{"class_prompt": rng.random((1, 2, 4, 4))} for _ in images]
    heat[3]["class_prompt"][0, 1, 2, 3] = np.inf
    assert found_faults(images, heat) == [None, "constant", "not finite", "not finite"]
    assert found_faults(good[None] * 1e-4) == ["constant"]  # black after rounding
    flat, seen = np.full((2, 3, 4, 4), 0.1), np.full((2, 3, 4, 4), 0.1)
    seen[1, 0, 2, 2] = 0.2  # one class of two was looked at
    assert found_faults(good[None], [{"class_prompt": flat}]) == ["empty mask"]
    assert found_faults(good[None], [{"class_prompt": seen}]) == ["empty mask"]  # at powers 1 and 2
    seen[0, 1, 0, 0] = seen[0, 2, 0, 0] = 0.2  # it may be another one at another power
    assert found_faults(good[None], [{"class_prompt": seen}]) == [None]
    assert found_faults(good[None], [{"class_prompt": seen, "full_prompt_caption": flat}]) == [
        "empty mask"
    ]
    rounding = seen - seen.mean((2, 3), keepdims=True)
    assert found_faults(good[None], [{"class_prompt": 0.1 + 1e-7 * rounding}]) == ["empty mask"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_of_an_image_are_rounded_as_pillow_is_given_them_elsewhere(dtype):
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    images[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.5])
    pixels, finite, constant = eight_bit(images)
    expected = (
        (images.permute(0, 2, 3, 1).float().numpy() * 255).round().astype(np.uint8)
    )  # as diffusers' numpy_to_pil
    assert (
        pixels.dtype == np.uint8
        and np.array_equal(pixels, expected)
        and finite == [True] * 2
        and constant == [False] * 2
    )
    images[1, 0, 2, 3] = torch.inf
    pixels, finite, _ = eight_bit(images)
    assert (
        finite == [True, False]
        and np.array_equal(pixels[0], expected[0])
        and pixels[1, 2, 3, 0] == 255
    )


def test_bytes_of_an_image_are_truncated_where_that_is_asked_for(model, made, samples, changed):
    images = torch.tensor([0.0, 0.9, 0.5, 0.999, 1.0, 0.0038]).view(1, 1, 1, 6)
    assert eight_bit(images)[0].ravel().tolist() == [0, 230, 128, 255, 255, 1]
    assert eight_bit(images, truncate=True)[0].ravel().tolist() == [0, 229, 127, 254, 255, 0]
    assert "truncate" not in model.identity()
    changed(truncate=True)
    pixels, heat, _ = model.generate(samples)
    step = made[0].astype(int) - pixels
    assert set(np.unique(step)) == {0, 1} and 0.4 < step.mean() < 0.6
    for maps, before in zip(heat, made[1], strict=True):
        assert maps["class_prompt"].tobytes() == before["class_prompt"].tobytes()


def test_overflow_and_constant_images_are_named(model, made, samples, monkeypatch):
    decode = model.pipe.vae.decode

    def broken(latents, **kwargs):
        (images,) = decode(latents, **kwargs)
        images[1], images[2] = float("nan"), 0.3
        return (images,)

    monkeypatch.setattr(model.pipe.vae, "decode", broken)
    images, heat, bad = model.generate(samples)
    assert bad == [None, "not finite", "constant"] and len(heat) == 3
    assert images.dtype == np.uint8 and images[0].tobytes() == made[0][0].tobytes()


# Memory


@pytest.mark.parametrize("saving", [{"vae_slicing": True}, {"offload": "model"}])
def test_saving_memory_does_not_change_the_image(folder, settings, saving, made, samples):
    model = TextToImage(model=str(folder), **settings, full_prompt=True, **saving)
    images, heat, _ = model.generate(samples)
    np.testing.assert_allclose(images.astype(int), made[0], atol=1)
    for a, b in zip(heat, made[1], strict=True):
        assert all(a[source].tobytes() == b[source].tobytes() for source in a)
    assert model.pipe.vae.use_slicing == ("vae_slicing" in saving)
    assert all(
        hasattr(part, "_hf_hook") == ("offload" in saving)
        for part in (model.pipe.unet, model.pipe.vae)
    )
    again = model.read_real(images, samples, [50])
    assert again[0]["class_prompt"].dtype == np.float64


# Real images


def test_heat_of_real_images(model, samples, sides, hooks):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    heat = model.read_real(images, samples, [50, 350])
    for sample, maps in zip(samples, heat, strict=True):
        assert maps.keys() == set(SOURCES[:3])
        shape = (len(sample.classes), 4, sides[1], sides[1])
        assert all(m.shape == shape and m.dtype == np.float64 for m in maps.values())
    again = model.read_real(images, samples, [50, 350])
    assert all(
        a["class_prompt"].tobytes() == b["class_prompt"].tobytes()
        for a, b in zip(heat, again, strict=True)
    )
    other = model.read_real(images[::-1].copy(), samples, [50, 350])
    assert np.abs(other[0]["class_prompt"].astype(float) - heat[0]["class_prompt"]).max() > 1e-4
    assert hooks() == 0


def test_real_images_are_shown_under_the_conditions_of_generation(model, samples):
    """What the UNet is told beside the latents is the same when it draws and when it looks."""
    told = []
    handle = model.pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append((args, kwargs)), with_kwargs=True
    )
    model.generate(samples, capture=False)
    model.read_real(np.zeros((3, 32, 32, 3), np.uint8), samples, [50])
    handle.remove()
    drawn, shown = told[0][1], told[-1]
    assert torch.equal(drawn["encoder_hidden_states"][3:], shown[0][2])
    for name, value in (shown[1]["added_cond_kwargs"] or {}).items():
        assert torch.equal(drawn["added_cond_kwargs"][name][3:], value), name


def test_half_precision_latents_of_real_images_do_not_overflow(folder, settings):
    model = TextToImage(model=str(folder), **settings, dtype="float16")
    images = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    latents = model._latents(images.permute(0, 2, 3, 1).numpy())
    assert latents.dtype == model.pipe.vae.dtype == torch.float16
    vae = TextToImage(model=str(folder), **settings).pipe.vae
    with torch.no_grad():
        exact = vae.encode(images / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(latents.float(), exact, rtol=2e-3, atol=2e-3)


# Prompts


def test_spans_point_at_the_class_words(model, samples):
    for sample in samples:
        spans, texts = model.spans(sample), [sample.class_prompt, sample.prompt, sample.prompt]
        assert list(spans) == list(SOURCES[:3])
        for text, positions in zip(texts, spans.values(), strict=True):
            ids = model.pipe.tokenizer(text).input_ids
            spelled = [
                model.pipe.tokenizer.decode([ids[p] for p in span]).strip() for span in positions
            ]
            assert spelled == list(sample.classes)
        caption = len(model.pipe.tokenizer(sample.prompt.split(";")[0]).input_ids) - 2
        assert (
            min(spans["full_prompt_appended"])[0] > caption >= max(spans["full_prompt_caption"])[-1]
        )


def test_each_mention_of_a_repeated_class_is_read(model, made, changed, sides):
    prompt = make_prompt("a tire, a tire and an apple", ["tire", "tire", "apple"], repeat=True)
    (sample,) = make_plan([prompt], taxonomy("shapes"), 0, 1)
    assert sample.prompt.endswith("; tire tire apple") and sample.classes == ("tire", "apple")
    tokenizer, spans = model.pipe.tokenizer, model.spans(sample)
    for text, positions in (
        (sample.class_prompt, "class_prompt"),
        (sample.prompt, "full_prompt_appended"),
    ):
        ids = tokenizer(text).input_ids
        spelled = [tokenizer.decode([ids[p] for p in span]).strip() for span in spans[positions]]
        assert spelled == ["tire tire", "apple"]
        assert all(len(set(span)) == len(span) for span in spans[positions])
    assert (
        min(spans["full_prompt_appended"][0])
        > len(tokenizer(sample.prompt.split(";")[0]).input_ids) - 2
    )
    ((heat,), (bad,)) = model.generate([sample])[1:]
    assert bad is None and all(maps.shape == (2, 4, sides[1], sides[1]) for maps in heat.values())


def sample_of(caption, classes, append=True):
    return make_plan([make_prompt(caption, classes, append)], taxonomy("shapes"), 0, 1)[0]


def test_a_class_missing_from_the_full_prompt(model, changed, sides):
    sample = sample_of("a round thing", ["tire"], append=False)
    message = r"full_prompt_caption: class \['tire'\] is missing from its prompt 'a round thing'"
    with pytest.raises(ValueError, match=message):
        model.generate([sample])
    there = model.generate([sample_of("a round tire", ["tire"], append=False)])[1][0]
    assert there.keys() == {"class_prompt", "full_prompt_caption"}
    assert there["full_prompt_caption"].shape == (1, 4, sides[1], sides[1])
    changed(full_prompt="appended")
    with pytest.raises(
        ValueError, match="no class words are appended to 'a round tire': prompts.append=true"
    ):
        model.generate([sample_of("a round tire", ["tire"], append=False)])
    named_by_another_word = sample_of("a round thing", ["tire"])
    assert model.generate([named_by_another_word])[1][0].keys() == {
        "class_prompt",
        "full_prompt_appended",
    }
    changed(full_prompt=False)
    assert model.generate([sample])[1][0].keys() == {
        "class_prompt"
    }  # the class prompt alone has the word


@pytest.mark.parametrize("append", [True, False])
def test_each_class_is_read_at_its_own_words(model, append):
    """Nested names, each in two words of several tokens, against the tokens spelled out."""
    (sample,) = make_plan(
        [make_prompt("two gold rings, a ring", ["ring", "gold ring"], append)],
        Taxonomy("t", ["ring", "gold ring"]),
        0,
        1,
    )
    ids, spelled = model.pipe.tokenizer(sample.prompt).input_ids, {}
    for source, spans in model.spans(sample).items():
        if source != "class_prompt":
            spelled[source] = [
                model.pipe.tokenizer.decode([ids[p] for p in span]).strip() for span in spans
            ]
    expected = {"full_prompt_appended": ["ring", "gold ring"]} if append else {}
    assert spelled == expected | {"full_prompt_caption": ["ring", "gold rings"]}


def test_words_of_the_full_prompt_can_be_chosen(changed, samples, made):
    """The same attention, read at other tokens: what is kept beside does not change it."""
    for words in ("appended", "caption"):
        images, heat, _ = changed(full_prompt=words).generate(samples)
        assert images.tobytes() == made[0].tobytes()
        for maps, both in zip(heat, made[1], strict=True):
            assert maps.keys() == {"class_prompt", f"full_prompt_{words}"}
            assert all(maps[source].tobytes() == both[source].tobytes() for source in maps)
    assert (
        np.abs(made[1][0]["full_prompt_appended"] - made[1][0]["full_prompt_caption"]).max() > 1e-4
    )


def test_classes_that_share_all_their_tokens_are_named(model, samples, monkeypatch):
    """As where a tokenizer makes one piece of two words."""
    monkeypatch.setattr(Stream, "offsets", lambda self, text: [(0, 0), (0, len(text)), (0, 0)])
    with pytest.raises(ValueError, match="classes 'apple' and 'gold ring' are read at the same"):
        model.spans(samples[0])
    assert model.spans(samples[1])["class_prompt"] == [[1]]


def test_a_class_beyond_the_token_limit(model):
    with pytest.raises(
        ValueError, match=r"class 'tire' is cut off: .*text encoder's 77 tokens. Shorten"
    ):
        model.generate([sample_of("a photo of a " + "very " * 80 + "round thing", ["tire"])])


def test_tokens_are_counted_with_start_and_end_and_nothing_is_cut_off(model):
    assert model.token_limit == 77 and model.token_count("") == 2
    words = "apple " * 100
    pieces = len(model.pipe.tokenizer.tokenize("apple"))
    assert model.token_count(words) == 2 + 100 * pieces


class Words:
    """A tokenizer whose tokens are pieces of ``size`` letters."""

    def __init__(self, size, limit):
        self.size, self.model_max_length = size, limit

    def __call__(self, text, return_offsets_mapping=False, truncation=False, max_length=None):
        starts = range(0, len(text), self.size)
        offsets = [(0, 0), *((a, min(a + self.size, len(text))) for a in starts), (0, 0)]
        ids = list(chain([1], starts, [2]))

        class Encoded:
            input_ids, offset_mapping = ids, offsets

        return Encoded


def test_of_two_tokenizers_the_stricter_one_counts(model, samples, monkeypatch):
    monkeypatch.setattr(model.pipe, "tokenizer", Words(3, 77))
    monkeypatch.setattr(model.pipe, "tokenizer_2", Words(2, 60), raising=False)
    assert model.token_limit == 60
    assert model.token_count("abcdef") == 2 + 3
    with pytest.raises(
        ValueError,
        match=f"two tokenizers of this model split {samples[0].class_prompt!r} differently",
    ):
        model.spans(samples[0])


# Settings


def test_settings_reach_the_pipeline(folder, settings):
    other = {"cross_resolution": None, "self_resolution": None, "size": 48, "dtype": "bfloat16"}
    model = TextToImage(
        model=str(folder), **{**settings, **other}, scheduler="EulerDiscreteScheduler"
    )
    assert type(model.pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    own = TextToImage(model=str(folder), scheduler=None)
    assert model.pipe.scheduler.config.prediction_type == own.pipe.scheduler.config.prediction_type
    assert model.pipe.unet.dtype == model.pipe.vae.dtype == torch.bfloat16
    assert (model.size, own.size) == (48, 32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "diffusion.steps=0: expected a whole number from 1 to 1000"),
        ({"max_power": -1}, "diffusion.max_power=-1: expected a whole number from 0 to 64"),
        ({"size": 34}, "diffusion.size=34: must be a multiple of 8"),
        ({"size": -8}, "diffusion.size=-8: expected .*the side"),
        ({"safety_checker": "maybe"}, "diffusion.safety_checker='maybe': expected on, off"),
        ({"offload": "disk"}, "diffusion.offload='disk': expected none, model"),
        (
            {"full_prompt": "both"},
            "diffusion.full_prompt='both': expected true or false, or appended, caption, ",
        ),
        ({"dtype": "half"}, "diffusion.dtype='half': expected float32, float16, bfloat16"),
        (
            {"scheduler": "DDIM"},
            r"diffusion\.scheduler='DDIM'; allowed for this model: .*DDIMScheduler, "
            r".*EulerDiscreteSch",
        ),
        (
            {"cross_resolution": 32},
            r"diffusion\.cross_resolution=32: this model has no cross-attention there; it has \[",
        ),
        (
            {"self_resolution": 5},
            r"diffusion\.self_resolution=5: this model has no self-attention there; it has \[",
        ),
        ({"safety_checker": "on"}, r"diffusion\.safety_checker=on, but .* has none"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(folder, settings, wrong, message):
    with pytest.raises(ValueError, match=message):
        TextToImage(model=str(folder), **{**settings, **wrong})


def test_the_identity_is_plain_and_names_what_differs(folder, settings, model):
    identity = model.identity()
    assert json.loads(json.dumps(identity)) == identity  # what run.json gives back is equal
    assert identity == model.identity()
    assert {
        "steps": 2,
        "guidance": 3.0,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }.items() <= identity.items()
    same = {"offload": "model", "licence": "some", "link": "somewhere", "require_revision": True}
    assert (
        TextToImage(model=str(folder), **settings, full_prompt=True, **same).identity() == identity
    )
    other = TextToImage(
        model=str(folder), **{**settings, "guidance": 4.0}, full_prompt=True
    ).identity()
    assert {k for k in identity if identity[k] != other[k]} == {"guidance"}
    sliced = TextToImage(
        model=str(folder), **settings, full_prompt=True, vae_slicing=True
    ).identity()
    assert sliced == {**identity, "vae_slicing": True}


def test_options_that_came_later_are_named_only_where_they_are_used(folder, settings, model):
    """Sets that were made before stay sets of the same generator."""
    later = {
        "reading",
        "read_at",
        "read_draws",
        "mirror",
        "cross_groups",
        "background_words",
        "head_weights",
        "layer_weights",
        "class_forward",
        "self_layers",
        "pool",
        "max_tokens",
        "true_guidance",
        "t5",
    }
    assert later <= set(type(model.settings).model_fields)
    assert not later & model.identity().keys()
    used = {"reading": "both", "read_at": [50, 300], "read_draws": 2, "mirror": True}
    used |= {"pool": 2, "self_layers": ["up_blocks"], "head_weights": True}
    other = TextToImage(model=str(folder), **settings, full_prompt=True, **used).identity()
    assert other == {**model.identity(), **used}


def test_the_identity_names_the_sides_that_were_chosen(folder, settings, kind):
    free = {**settings, "cross_resolution": None, "self_resolution": None}
    identity = TextToImage(model=str(folder), **free).identity()
    # latents of 16: 4 and 8 are wanted; sd has attention at 16 and 8 only
    assert (identity["cross_resolution"], identity["self_resolution"]) == (
        (8, 8) if kind == "sd" else (4, 8)
    )


def test_the_terms_of_the_weights_are_kept_for_the_data_card(folder):
    model = TextToImage(model=str(folder), licence="Apache-2.0", link="https://example.org")
    assert model.terms == {"licence": "Apache-2.0", "link": "https://example.org"}
    assert TextToImage(model=str(folder)).terms == {"licence": None, "link": None}
