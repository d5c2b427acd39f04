"""Every family of models, by a tiny checkpoint in its real folder layout: loaded by its preset, its
images untouched, its attention equal to the formula written out."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import DDPMScheduler, DiffusionPipeline

from dd import config
from dd.attention.observer import Observer
from dd.attention.sites import Layout
from dd.generators import TextToImage
from dd.generators.families.base import Diffusing
from dd.masks.presence import NUMBERS
from dd.prompts.prompt import make_prompt
from dd.store.samples import make_plan, sample_seed
from dd.taxonomy import taxonomy
from tests.generators import tiny

CAPTIONS = [
    ("a photo of an apple and a gold ring", ("apple", "gold ring")),
    ("a tire, a brick and a heart in dark light", ("tire", "brick", "heart")),
]
# where the conditional half is, as diffusers' pipelines put it
CALLS = dict.fromkeys(("qwen_image", "flux_dev", "flux2_klein"), "calls")
HALVES = {"z_image": "first", **CALLS, "flux_schnell": "only"}
TEXT_FIRST = ("flux_dev", "flux_schnell", "flux2_klein", "qwen_image")
APART = ("pixart_sigma", "sana")  # text that stands apart
CHATS = ("qwen_image", "z_image", "flux2_klein", "sana")
# each is guided, but the distilled one; layers of the published size are not there
OWN = {
    "flux_dev": ["diffusion.true_guidance=2.0", "diffusion.negative_prompt=a brick"],
    "flux_schnell": ["diffusion.max_tokens=64"],
    "z_image": ["diffusion.guidance=3.0"],
    "flux2_klein": ["diffusion.guidance=3.0"],
    "sana": ["diffusion.max_power=0"],  # its attention among pixels is linear
}
SIZE, SIDE = 32, 8


def powers(family):
    return 1 if family == "sana" else 4


@pytest.fixture(scope="module", params=tiny.BUILDERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return tiny.save(family, tmp_path_factory.mktemp(family), [text for text, _ in CAPTIONS])


@pytest.fixture(scope="module")
def build(family, folder):
    """``build(*overrides)``: the generator of the family's preset, its model path replaced."""

    def made(*overrides):
        fixed = [
            f"diffusion={family}",
            f"diffusion.model={folder}",
            f"diffusion.size={SIZE}",
            "diffusion.steps=2",
            "diffusion.max_power=3",
            "diffusion.dtype=float32",
            "diffusion.cross_layers=null",
            "diffusion.self_layers=null",
            *OWN.get(family, []),
        ]
        cfg = config.compose("generate", [*fixed, *overrides])
        return config.instantiate(cfg.diffusion)

    return made


@pytest.fixture(scope="module")
def generator(build):
    return build("diffusion.reading=both", "diffusion.full_prompt=true")


@pytest.fixture(scope="module")
def samples():
    prompts = [make_prompt(caption, classes) for caption, classes in CAPTIONS]
    return make_plan(prompts, taxonomy("shapes"), 5, 2)


@pytest.fixture(scope="module")
def made(generator, samples):
    return generator.generate(samples)


def test_images_and_heat_have_their_form(family, generator, made, samples):
    images, heat, bad = made
    assert images.shape == (2, SIZE, SIZE, 3) and images.std() > 5 and bad == [None, None]
    words = {"full_prompt_appended", "full_prompt_caption", "after"}
    words |= {"class_prompt"} if family in APART else set()
    for sample, maps in zip(samples, heat, strict=True):
        assert maps.keys() == words == generator.spans(sample).keys()
        for stored in maps.values():
            assert stored.shape == (len(sample.classes), powers(family), SIDE, SIDE)
            assert stored.dtype == np.float64 and np.isfinite(stored).all()
            assert (stored[:, 0].max((1, 2)) > stored[:, 0].min((1, 2))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_capture_does_not_change_a_bit_of_the_image(build, generator, samples, dtype):
    model = build(f"diffusion.dtype={dtype}", "diffusion.reading=both")
    images, heat, _ = model.generate(samples)
    again, nothing, _ = model.generate(samples, capture=False)
    assert images.tobytes() == again.tobytes() and nothing == []
    assert all(np.isfinite(maps).all() for each in heat for maps in each.values())


def test_the_image_is_that_of_the_plain_pipeline(family, folder, generator, made, samples):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    given = generator.settings
    by_family = {
        "flux_dev": {"true_cfg_scale": 2.0, "negative_prompt": ["a brick"] * 2},
        "flux_schnell": {"max_sequence_length": 64},
        "pixart_sigma": {"clean_caption": False, "use_resolution_binning": False},
        "qwen_image": {"negative_prompt": [" "] * 2},
        "sana": {"clean_caption": False, "use_resolution_binning": False},
    }
    guided = "true_cfg_scale" if family == "qwen_image" else "guidance_scale"
    plain = pipe(
        prompt=[s.prompt for s in samples],
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(s.seed) for s in samples],
        output_type="np",
        **{guided: given.guidance, **by_family.get(family, {})},
    ).images
    np.testing.assert_array_equal((plain * 255).round().astype(np.uint8), made[0])


def test_spans_point_at_the_class_words_of_every_encoder(family, generator, samples):
    streams = generator.family.streams()
    assert len(streams) == (2 if family.startswith("sd3") else 1)
    for sample in samples:
        spans = generator.spans(sample)
        texts = dict.fromkeys(spans, sample.prompt) | {
            "after": sample.class_prompt,
            "class_prompt": sample.class_prompt,
        }
        for source, classes in spans.items():
            for name, rows in zip(sample.classes, classes, strict=True):
                for stream in streams:
                    given = stream.template(texts[source])
                    ids = stream.tokenizers[0](given).input_ids[stream.dropped :]
                    own = [r - stream.first for r in rows if 0 <= r - stream.first < len(ids)]
                    assert stream.tokenizers[0].decode([ids[r] for r in own]).strip() == name


class Explicit:
    """Queries and keys of every fused attention of a network, as torch is given them."""

    def __init__(self, network):
        self.calls, self.network = [], network

    def __enter__(self):
        fused = self.fused = F.scaled_dot_product_attention

        def kept(query, key, value, attn_mask=None, **given):
            self.calls.append((query.double(), key.double(), attn_mask))
            return fused(query, key, value, attn_mask=attn_mask, **given)

        # text encoders attend too
        self.hooks = [
            self.network.register_forward_pre_hook(
                lambda *_: setattr(F, "scaled_dot_product_attention", kept)
            ),
            self.network.register_forward_hook(
                lambda *_: setattr(F, "scaled_dot_product_attention", fused)
            ),
        ]
        return self

    def __exit__(self, *_):
        F.scaled_dot_product_attention = self.fused
        for hook in self.hooks:
            hook.remove()

    def joint(self, family, rows):
        """(attention of the pixels to all keys, to the keys of pixels) of each joint call, mean
        over heads, of the conditional half; and of the calls among pixels alone."""
        both, alone = [], []
        for number, (q, k, mask) in enumerate(self.calls):
            if q.shape[2] != k.shape[2]:
                continue
            if family.startswith("sd3") and q.shape[2] == SIDE**2:
                image = (q[rows] @ k[rows].mT / q.shape[3] ** 0.5).softmax(-1)
                alone.append(image.mean(1))
            elif q.shape[2] > SIDE**2:
                first = q.shape[2] - SIDE**2 if family in TEXT_FIRST else 0
                pixels = slice(first, first + SIDE**2)
                logits = q[rows][:, :, pixels] @ k[rows].mT / q.shape[3] ** 0.5
                if mask is not None:
                    seen = mask[rows] if len(mask) > 1 else mask
                    seen = seen if seen.ndim == 4 else seen[:, None, None]
                    seen = seen.log() if seen.dtype == torch.bool else seen
                    logits = logits + seen
                image = logits[..., pixels].softmax(-1)
                both.append((number, logits.softmax(-1).mean(1), image.mean(1)))
        return both, alone


def expected_heat(cross, own, spans, first):
    """``own`` None: there is no matrix among the pixels, and no power."""
    start = torch.stack([cross[:, [first + r for r in rows]].mean(1) for rows in spans])
    found = [start]
    for _ in range(3 if own is not None else 0):
        found.append(found[-1] @ own.T)
    return torch.stack(found, 1).view(len(spans), -1, SIDE, SIDE).numpy()


def words_first(family, layout_rows):
    return 0 if family in TEXT_FIRST else SIDE**2


def conditional(family, calls):
    """Of a drawing: rows of the batch, and which of the joint calls."""
    how = HALVES.get(family, "last")
    rows = {"first": slice(0, 2), "last": slice(-2, None)}.get(how, slice(None))
    if how != "calls":
        return rows, calls
    # two calls a step: the conditional first
    each = len(calls) // 4
    return rows, [c for i, c in enumerate(calls) if i // each % 2 == 0]


def test_heat_while_drawing_is_the_formula_written_out(family, generator, made, samples):
    if family in APART:  # the test below, and test_recorder.py
        assert not generator.layout.joint
        return
    with Explicit(generator.network) as seen:
        generator.generate(samples, capture=False)
    how = HALVES.get(family, "last")
    rows = {"first": slice(0, 2), "last": slice(-2, None)}.get(how, slice(None))
    both, alone = seen.joint(family, rows)
    both = [b for b in both if b[1].shape[2] > SIDE**2]
    _, both = conditional(family, both)
    own = torch.stack([image for _, _, image in both] + alone).mean(0)
    cross = torch.stack([c for _, c, _ in both]).mean(0)
    first = words_first(family, None)
    for i, sample in enumerate(samples):
        for source in ("full_prompt_appended", "full_prompt_caption"):
            spans = generator.spans(sample)[source]
            expected = expected_heat(cross[i], own[i], spans, first)
            np.testing.assert_allclose(made[1][i][source], expected, atol=1e-6, rtol=0)


def test_heat_after_drawing_is_the_formula_written_out(family, generator, samples, made):
    """The class prompt is shown: its own words are read."""
    finished = []
    keep = generator.family.last_latents
    generator.pipe(
        prompt=[s.prompt for s in samples],
        generator=[torch.Generator().manual_seed(s.seed) for s in samples],
        num_inference_steps=2,
        output_type="pt",
        **generator.family.call(2, SIZE),
        **keep(lambda latents: finished.append(latents)),
    )
    own_family, t = generator.family, generator.settings.read_at[0]
    noise = generator._noise([sample_seed(s.seed, "after", t) for s in samples])
    with torch.no_grad():  # with gradients torch encodes otherwise, by rounding
        text = own_family.text([s.class_prompt for s in samples])
    noised = own_family.noised(finished[-1], noise.to(finished[-1]), t)
    assert not torch.equal(noised, finished[-1])
    with torch.no_grad(), Explicit(generator.network) as seen:
        own_family.forward(noised.float(), t, text, SIZE)
    if family in APART:
        own = [q @ k.mT / q.shape[3] ** 0.5 for q, k, _ in seen.calls if q.shape[2] == k.shape[2]]
        assert bool(own) == (family != "sana")
        own = torch.stack([x.softmax(-1).mean(1) for x in own]).mean(0) if own else [None] * 2
        cross = [
            (q @ k.mT / q.shape[3] ** 0.5 + mask).softmax(-1).mean(1)
            for q, k, mask in seen.calls
            if q.shape[2] != k.shape[2]
        ]
        cross, first = torch.stack(cross).mean(0), 0
    else:
        both, alone = seen.joint(family, slice(None))
        own = torch.stack([image for _, _, image in both] + alone).mean(0)
        cross = torch.stack([c for _, c, _ in both]).mean(0)
        first = words_first(family, None)
    for i, sample in enumerate(samples):
        spans = generator.spans(sample)["after"]
        expected = expected_heat(cross[i], own[i], spans, first)
        np.testing.assert_allclose(made[1][i]["after"], expected, atol=1e-6, rtol=0)


def test_without_a_matrix_among_the_pixels_there_are_no_powers(family, build):
    """Linear attention has none."""
    if family != "sana":
        assert build().reading.self
        return
    assert not build().reading.self
    for wrong in ("max_power=3", "pool=2", "self_layers=[transformer_blocks]"):
        with pytest.raises(ValueError, match=rf"diffusion.{wrong.split('=')[0]}=.* is linear"):
            build(f"diffusion.{wrong}")


def test_heads_and_layers_are_weighed_by_the_formulas_written_out(family, build, samples):
    """Of one forward with the class prompt; FLUX's single blocks have no projection of their own,
    so that its double ones are chosen."""
    double = ["diffusion.cross_layers=[transformer_blocks]"] if family.startswith("flux") else []
    plain = build("diffusion.reading=after", *double)
    reference = plain.reading.cross[-1].name
    model = build(
        "diffusion.reading=after",
        "diffusion.head_weights=true",
        f"diffusion.layer_weights={reference}",
        *double,
    )
    images, heat, _ = plain.generate(samples)
    weighed, found, _ = model.generate(samples)
    assert weighed.tobytes() == images.tobytes()
    seen = {}

    def keep(name, attended):
        seen.setdefault(name, attended)

    finished = model._latents(images)
    t = model.settings.read_at[0]
    noise = model._noise([sample_seed(s.seed, "after", t) for s in samples])
    own = model.family
    with torch.no_grad():
        text = own.text([s.class_prompt for s in samples])
        read = model.read_real(images, samples, [])
        names = {site.name for site in model.reading.cross}
        with Observer(model.network, keep, names):
            own.forward(own.noised(finished, noise.to(finished), t), t, text, SIZE)
    layout = model.layout

    def pixels(x):
        return x[:, :, layout.image(x.shape[2])] if layout.joint else x

    for i, sample in enumerate(samples):
        maps, weights = [], []
        features = pixels(seen[reference].q)[i].transpose(0, 1).flatten(1).double()
        alike = (features @ features.T / features.shape[1] ** 0.5).softmax(-1)
        for site in model.reading.cross:
            a = seen[site.name]
            matrix = model.network.get_submodule(site.name).to_out[0].weight.detach().double()
            out = pixels(a.out)[i].double()
            heads, width = out.shape[0], out.shape[2]
            added = torch.stack(
                [out[h] @ matrix[:, h * width : (h + 1) * width].T for h in range(heads)]
            )
            whole = added.sum(0)
            shares = (added * whole).sum(-1) / (whole * whole).sum(-1)
            logits = pixels(a.q)[i].double() @ a.k[i].double().mT * a.scale
            if a.mask is not None:
                mask = a.mask[i] if len(a.mask) > 1 else a.mask[0]
                mask = mask if mask.ndim == 3 else mask[None, None]
                logits = logits + (mask.log() if mask.dtype == torch.bool else mask)
            attention = (logits.softmax(-1) * shares[..., None]).sum(0)
            directions = F.normalize(whole, dim=1)
            weights.append((alike * (directions @ directions.T)).sum().clamp(min=0))
            spans = model.spans(sample)["class_prompt"]
            first = layout.first_word()
            maps.append(torch.stack([attention[:, [first + r for r in s]].mean(1) for s in spans]))
        expected = sum(w * m for w, m in zip(weights, maps, strict=True)) / sum(weights)
        power_0 = read[i]["class_prompt"][:, 0].reshape(len(spans), -1)
        np.testing.assert_allclose(power_0, expected.numpy(), atol=1e-5, rtol=1e-4)
        assert np.abs(found[i]["class_prompt"] - heat[i]["class_prompt"]).max() > 1e-5


def test_a_layer_to_weigh_by_is_named_rightly_and_projects_its_heads(family, build):
    with pytest.raises(ValueError, match=r"layer_weights=nowhere: no layer .*\n  \S+"):
        build("diffusion.layer_weights=nowhere")
    if family.startswith("flux"):
        with pytest.raises(ValueError, match="single_transformer_blocks.0.attn projects its heads"):
            build("diffusion.head_weights=true")
    with pytest.raises(ValueError, match=r"weigh all heads; leave diffusion.cross_heads=\[0\]"):
        build("diffusion.head_weights=true", "diffusion.cross_heads=[0]")


def test_another_negative_prompt_leaves_the_heat_of_a_step_as_it_is(family, build, samples):
    """The first step has the same latents whatever guides it: what differs would be the other
    half's."""
    if family == "flux_schnell":  # it is not guided: there is no other half
        calls = []
        model = build("diffusion.steps=1", "diffusion.reading=sampling")
        model.network.register_forward_pre_hook(lambda *_: calls.append(1))
        model.generate(samples)
        assert calls == [1]
        return
    others = ["diffusion.negative_prompt=a brick", "diffusion.negative_prompt='ugly, tiling'"]
    if family == "flux2_klein":  # its pipeline knows no negative prompt but the empty one
        with pytest.raises(ValueError, match="diffusion.negative_prompt=a brick has no effect"):
            build(others[0])
        others = ["diffusion.guidance=3.0", "diffusion.guidance=1.0"]
    heats = []
    for other in others:
        model = build("diffusion.steps=1", "diffusion.reading=sampling", other)
        heats.append(model.generate(samples)[1])
    for a, b in zip(*heats, strict=True):
        for source, maps in a.items():
            np.testing.assert_allclose(maps, b[source], atol=1e-7, rtol=1e-5)


def test_a_sample_does_not_depend_on_the_others_of_its_batch(generator, samples, made):
    """Its words may be padded to the length of others'."""
    images, heat, _ = generator.generate([samples[1]])
    np.testing.assert_allclose(images[0].astype(int), made[0][1], atol=2)
    for source, maps in heat[0].items():
        np.testing.assert_allclose(maps, made[1][1][source], rtol=2e-3, atol=2e-5)


def test_images_become_the_latents_that_would_be_decoded_to_them(generator, samples, monkeypatch):
    """What the pipeline hands to its VAE is undone, number by number."""
    vae, finished, handed = generator.pipe.vae, [], []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **given: (handed.append(z), decode(z, **given))[1])
    generator.pipe(
        prompt=[s.prompt for s in samples],
        num_inference_steps=2,
        output_type="pt",
        **generator.family.call(2, SIZE),
        **generator.family.last_latents(lambda latents: finished.append(latents)),
    )
    found = SimpleNamespace(latent_dist=SimpleNamespace(mean=handed[0]), latent=handed[0])
    monkeypatch.setattr(vae, "encode", lambda _: found)
    latents = generator.family.encode(torch.zeros(2, 3, SIZE, SIZE))
    torch.testing.assert_close(latents, finished[-1].to(latents), rtol=1e-4, atol=1e-5)


def test_images_of_any_origin_are_read(family, build, made, samples):
    """In one forward; the words of the drawn prompt in a second one."""
    model = build("diffusion.reading=after", "diffusion.full_prompt=true")
    heat = model.read_real(made[0], samples, [])
    for maps, sample in zip(heat, samples, strict=True):
        assert maps.keys() == {"class_prompt", "full_prompt_appended", "full_prompt_caption"}
        assert maps.keys() == model.spans(sample).keys()
        for stored in maps.values():
            assert stored.shape == (len(sample.classes), powers(family), SIDE, SIDE)
    again = model.read_real(made[0][1:], samples[1:], [])
    for source, maps in again[0].items():
        np.testing.assert_allclose(maps, heat[1][source], rtol=2e-3, atol=2e-5)
    drawn, nothing, _ = model.generate(samples, capture=False)
    assert drawn.tobytes() == made[0].tobytes() and nothing == []


def test_words_of_the_background_stand_behind_the_classes(family, build, made, samples):
    """They are part of the text that is read, at rows of their own; the image stays as it is."""
    words = "diffusion.background_words=[ring,dark light]"
    model, plain = build("diffusion.reading=after", words), build("diffusion.reading=after")
    for sample in samples:
        spans, before = model.spans(sample), plain.spans(sample)["class_prompt"]
        assert spans.keys() == {"class_prompt", "background"} and len(spans["background"]) == 2
        assert spans["class_prompt"] == before
        rows = [r for each in spans["background"] for r in each]
        assert not set(rows) & {r for each in before for r in each}
        for stream in model.family.streams():
            given = stream.template(f"{sample.class_prompt} ring dark light")
            ids = stream.tokenizers[0](given).input_ids[stream.dropped :]
            for name, own in zip(("ring", "dark light"), spans["background"], strict=True):
                inside = [r - stream.first for r in own if 0 <= r - stream.first < len(ids)]
                assert stream.tokenizers[0].decode([ids[r] for r in inside]).strip() == name
    images, heat, _ = model.generate(samples)
    assert images.tobytes() == made[0].tobytes()
    assert [maps["background"].shape[0] for maps in heat] == [2, 2]
    own = plain.generate(samples)[1]
    assert np.abs(heat[0]["class_prompt"] - own[0]["class_prompt"]).max() > 0  # they compete
    if family not in APART:
        with pytest.raises(ValueError, match="background_words=.* stand in the class prompt"):
            build("diffusion.reading=sampling", words)


def test_the_mirrored_image_is_read_too(build, made, samples):
    """The mean of the heat of an image and of what is turned back of its mirror's; of one drawn,
    of its pixels."""
    plain, model = (
        build("diffusion.reading=after"),
        build("diffusion.reading=after", "diffusion.mirror=true"),
    )
    images = made[0]
    found = model.read_real(images, samples, [])
    one = plain.read_real(images, samples, [])
    other = plain.read_real(np.ascontiguousarray(images[:, :, ::-1]), samples, [])
    for maps, a, b in zip(found, one, other, strict=True):
        expected = (a["class_prompt"] + b["class_prompt"][..., ::-1]) / 2
        np.testing.assert_allclose(maps["class_prompt"], expected, atol=1e-6, rtol=0)
        assert np.abs(a["class_prompt"] - b["class_prompt"][..., ::-1]).max() > 1e-5
    drawn, heat, _ = model.generate(samples)
    assert drawn.tobytes() == images.tobytes()
    assert np.abs(heat[0]["class_prompt"] - plain.generate(samples)[1][0]["class_prompt"]).max() > 0
    with pytest.raises(ValueError, match="mirror=true .*belong to a reading after drawing"):
        build("diffusion.reading=sampling", "diffusion.mirror=true")


def test_several_noises_are_read_at_a_timestep(build, made, samples):
    """The first is that of a single one."""
    one, two = (build("diffusion.reading=after", f"diffusion.read_draws={n}") for n in (1, 2))
    seen = []
    noise = two._noise
    two._noise = lambda seeds: (seen.append(tuple(seeds)), noise(seeds))[1]
    heat = two.read_real(made[0], samples, [])
    t = two.settings.read_at[0]
    assert len(set(seen)) == 2 * len(two.settings.read_at)
    assert seen[0] == tuple(sample_seed(s.seed, "after", t) for s in samples)
    assert (
        np.abs(
            heat[0]["class_prompt"] - one.read_real(made[0], samples, [])[0]["class_prompt"]
        ).max()
        > 0
    )


def test_a_prediction_is_what_the_pipeline_hands_to_its_scheduler(generator, samples, monkeypatch):
    """Sign, form and timestep: those of the first step of an unguided drawing."""
    pipe, family = generator.pipe, generator.family
    handed = []

    class Enough(Exception):
        pass

    def step(predicted, timestep, latents, **_):
        handed.extend((predicted.clone(), float(timestep), latents.clone()))
        raise Enough

    monkeypatch.setattr(pipe.scheduler, "step", step)
    given = {**family.call(2, SIZE), "negative_prompt": None}
    for name in ("true_cfg_scale", *(["negative_prompt"] if "klein" in str(family) else [])):
        given.pop(name, None)
    given[family.guided] = family.unguided
    given = {k: v for k, v in given.items() if k in inspect.signature(pipe.__call__).parameters}
    with pytest.raises(Enough):
        pipe(
            prompt=[s.prompt for s in samples],
            num_inference_steps=2,
            generator=[torch.Generator().manual_seed(s.seed) for s in samples],
            **given,
        )
    with torch.no_grad():
        text = family.text([s.prompt for s in samples])
        output = family.forward(handed[2], handed[1], text, SIZE)
    found = family.predicted(output)
    torch.testing.assert_close(found, handed[0], rtol=1e-3, atol=1e-4)


def test_the_target_of_a_prediction_leads_back_to_the_latents(generator):
    family = generator.family
    shape = family.latent_shape(SIZE)
    clean, noise = (
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    for t in (100, 700):
        noised, target = family.noised(clean, noise, t), family.target(clean, noise, t)
        if isinstance(family, Diffusing):
            assert generator.pipe.scheduler.config.prediction_type == "epsilon"
            schedule = DDPMScheduler.from_config(generator.pipe.scheduler.config)
            kept = schedule.alphas_cumprod[t]
            back = (noised - (1 - kept) ** 0.5 * target) / kept**0.5
        else:
            back = noised - t / 1000 * target
        torch.testing.assert_close(back, clean, rtol=1e-4, atol=1e-4)


def test_what_a_word_explains_is_the_error_of_the_prediction_without_it(build, made, samples):
    """Each text alone, in a forward of its own, at the same noise."""
    model = build("diffusion.reading=after", "diffusion.word_errors=[300,800]")
    family, sample = model.family, samples[1]
    assert sample.class_prompt == "tire brick heart"
    found = model.read_real(made[0], samples, [])
    assert [sorted(maps) for maps in found] == [["class_prompt", *NUMBERS]] * 2
    latents = model._latents(made[0])[1:]

    @torch.no_grad()
    def error(text, t):
        noise = model._noise([sample_seed(sample.seed, "words", t)])
        noised = family.noised(latents, noise, t)
        out = family.predicted(family.forward(noised, t, family.text([text]), SIZE))
        return float((out - family.target(latents, noise, t)).double().square().mean())

    without = {"tire": "brick heart", "brick": "tire heart", "heart": "tire brick"}
    for k, (name, others) in enumerate(without.items()):
        expected = {"evidence": [], "evidence_alone": []}
        for t in (300, 800):
            nothing = error("", t)
            expected["evidence"].append((error(others, t) - error("tire brick heart", t)) / nothing)
            expected["evidence_alone"].append((nothing - error(name, t)) / nothing)
        for source, values in expected.items():
            value = found[1][source][k]
            assert value.shape == (1, 1, 1)
            np.testing.assert_allclose(value.item(), np.mean(values), rtol=2e-3, atol=2e-5)
    images, heat, faults = model.generate(samples)
    assert images.tobytes() == made[0].tobytes() and faults == [None, None]
    assert all(heat[0][source].shape == (2, 1, 1, 1) for source in NUMBERS)
    with pytest.raises(ValueError, match="word_errors=.* are measured after drawing"):
        build("diffusion.reading=sampling", "diffusion.word_errors=[300]")


def test_the_class_prompt_can_be_shown_at_each_step(family, build, samples, made):
    """In a second forward, which is that of its text at the same latents and changes nothing."""
    if family in APART:
        with pytest.raises(ValueError, match="class_forward=true: .*no second forward is needed"):
            build("diffusion.class_forward=true")
        return
    given = ["diffusion.class_forward=true", "diffusion.reading=sampling"]
    model, seen, shown = build(*given), [], []
    handle = model.network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    images, heat, _ = model.generate(samples)
    handle.remove()
    assert images.tobytes() == made[0].tobytes()
    assert (
        heat[0].keys()
        == model.spans(samples[0]).keys()
        == {
            "class_prompt",
            "full_prompt_appended",
        }
    )
    text = model.family.text([s.class_prompt for s in samples])["encoder_hidden_states"]
    for args, kwargs in seen:
        states = args[2] if args else kwargs["encoder_hidden_states"]
        own = len(states) == 2 and len(states[0]) == len(text[0])
        if own and torch.allclose(states[0], text[0], atol=1e-4):  # encoded with gradients here
            shown.append((args, kwargs))
    assert len(shown) == 2  # one a step
    with torch.no_grad(), Explicit(model.network) as by_hand:
        for args, kwargs in shown:
            model.network(*args, **kwargs)
    both, alone = by_hand.joint(family, slice(None))
    own = torch.stack([image for _, _, image in both] + alone).mean(0)
    cross = torch.stack([c for _, c, _ in both]).mean(0)
    for i, sample in enumerate(samples):
        spans = model.spans(sample)["class_prompt"]
        expected = expected_heat(cross[i], own[i], spans, words_first(family, None))
        np.testing.assert_allclose(heat[i]["class_prompt"], expected, atol=1e-6, rtol=0)


def test_attention_among_pixels_can_be_pooled(family, build, samples):
    if family == "sana":
        return
    whole, pooled = (
        build("diffusion.reading=both"),
        build("diffusion.reading=both", "diffusion.pool=2"),
    )
    heat, small = whole.generate(samples)[1], pooled.generate(samples)[1]
    for a, b in zip(heat, small, strict=True):
        for source, maps in a.items():
            assert b[source].shape[2:] == (SIDE // 2, SIDE // 2)
            # one application of it to a map that has been pooled, in the matrix and as operator
            assert np.abs(b[source][:, 1].mean((1, 2)) - maps[:, 1].mean((1, 2))).max() < 0.01
    with pytest.raises(ValueError, match="diffusion.pool=3: expected a divisor of 8"):
        build("diffusion.pool=3")


def test_where_attention_is_read_is_recorded(family, generator):
    kinds = {s.kind for s in generator.sites}
    expected = {
        "pixart_sigma": {"self", "cross"},
        "sana": {"cross"},
        "sd35_medium": {"self", "joint"},
    }
    assert kinds == expected.get(family, {"joint"})
    assert {s.side for s in generator.sites} == {SIDE}


def test_words_can_be_read_in_a_later_layer_alone(family, build, samples):
    """Earlier ones have mixed the words by then; the order of the keys is the model's."""
    model = build("diffusion.reading=both")
    last = [s.name for s in model.sites if s.kind in ("cross", "joint")][-1]
    later = build("diffusion.reading=both", f"diffusion.cross_layers=[{last}]")
    assert [s.name for s in later.reading.cross] == [last]
    whole, part = model.generate(samples)[1], later.generate(samples)[1]
    assert all(np.isfinite(part[0][source]).all() for source in part[0])
    assert np.abs(whole[0]["after"] - part[0]["after"]).max() > 0


def test_layers_are_chosen_by_name(family, build, generator):
    kind, first = ("cross" if family == "sana" else "self"), generator.sites[0].name
    model = build(f"diffusion.{kind}_layers=[{first}]")
    assert [s.name for s in getattr(model.reading, kind)] == [first]
    with pytest.raises(ValueError, match=rf"diffusion.{kind}_layers=.*begins with this: nowhere"):
        build(f"diffusion.{kind}_layers=[nowhere]")


def test_parts_that_wait_off_the_device_are_read_alike(build, samples, made):
    model = build("diffusion.offload=model", "diffusion.reading=both", "diffusion.full_prompt=true")
    assert_same(model.generate(samples), made)


def test_layers_that_wait_off_the_device_are_read_alike(build, samples, made):
    """As offload=sequential does on a GPU; here the network's layers go to and fro on a CPU."""
    model = build("diffusion.reading=both", "diffusion.full_prompt=true")
    cpu_offload(model.network, torch.device("cpu"))
    assert next(model.network.parameters()).device.type == "meta"
    assert_same(model.generate(samples), made)
    with pytest.raises(ValueError, match="diffusion.offload=sequential .*device=cpu"):
        build("diffusion.offload=sequential")


def assert_same(one, other):
    assert one[0].tobytes() == other[0].tobytes()
    for a, b in zip(one[1], other[1], strict=True):
        assert all(a[source].tobytes() == b[source].tobytes() for source in b)


def test_weights_in_eight_bits_are_read_alike(build, samples, made):
    """Other weights, so other pixels; nothing of them is changed by reading."""
    model = build("diffusion.quantize=float8", "diffusion.reading=both")
    assert model.identity()["quantize"] == "float8"
    assert torch.float8_e4m3fn in {p.dtype for p in model.network.parameters()}
    images, heat, bad = model.generate(samples)
    again, _, _ = model.generate(samples, capture=False)
    assert images.tobytes() == again.tobytes() and bad == [None, None]
    difference = np.abs(images.astype(int) - made[0]).mean()
    assert 0 < difference < 20
    for a, b in zip(heat, made[1], strict=True):
        np.testing.assert_allclose(a["after"][:, 0], b["after"][:, 0], atol=0.1)


def test_a_class_may_be_a_word_of_the_template(family, generator):
    """Of a chat: its text stands where two chats begin to differ."""
    for stream in generator.family.streams():
        words = [w for w in ("user", "art", "ship", "image") if w in stream.template("0")]
        assert bool(words) == (family in CHATS)
        for word in words:
            at = [i for i, (a, b) in enumerate(stream.offsets(word)) if a < b]
            ids = stream.tokenizers[0](stream.template(word)).input_ids[stream.dropped :]
            assert stream.tokenizers[0].decode([ids[i] for i in at]).strip() == word
            before = stream.tokenizers[0](stream.template("")).input_ids[stream.dropped :]
            same = [a == b for a, b in zip(ids, before, strict=False)]
            assert at[0] >= (same.index(False) if False in same else len(same))


def test_offloaded_parts_go_back_when_an_image_is_read(build, samples, made, monkeypatch):
    """Or the next text encoder would stand beside the network on the GPU."""
    model, freed = build("diffusion.reading=after"), []
    monkeypatch.setattr(model.pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    model.read_real(made[0], samples, [])
    assert freed == [1]


# What cannot be read


def test_attention_that_goes_past_torch_is_named(build, generator, monkeypatch):
    """As flash and sage attention do: nothing of it is seen."""

    def elsewhere(query, key, value, attn_mask=None, **given):
        scores = query @ key.mT * (given.get("scale") or query.shape[3] ** -0.5)
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, -np.inf)
                if (attn_mask.dtype == torch.bool)
                else scores + attn_mask
            )
        return scores.softmax(-1) @ value

    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        "dd.attention.observer.F", SimpleNamespace(scaled_dot_product_attention=fused)
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", elsewhere)
    with pytest.raises(ValueError, match="was not seen .*attention backend is .*native"):
        build()


def test_keys_in_another_order_are_noticed(family, build, generator, monkeypatch):
    layout = generator.layout
    other = {"first": "last", "last": "first"}.get(layout.text)
    if other is None:  # text that stands apart has no order
        assert family in APART
        return
    turned = Layout(other, layout.pixels, layout.image_rows)
    monkeypatch.setattr(type(generator.family), "layout", lambda *_: turned)
    with pytest.raises(ValueError, match="key row .*another way than this package expects"):
        build()


def test_a_class_word_that_is_cut_off_is_named(family, build, samples):
    model = build(f"diffusion.max_tokens={6 if family in ('z_image', 'flux2_klein') else 3}")
    with pytest.raises(ValueError, match="is cut off: .*longer than"):
        model.spans(samples[1])


def test_a_size_that_its_patches_do_not_fill(build):
    with pytest.raises(ValueError, match="diffusion.size=36: must be a multiple of 8"):
        build("diffusion.size=36")


def test_stable_diffusion_3_can_do_without_t5(family, build, samples):
    if not family.startswith("sd3"):
        with pytest.raises(ValueError, match="diffusion.t5=False has no effect.*StableDiffusion3"):
            build("diffusion.t5=false")
        return
    model = build("diffusion.t5=false", "diffusion.reading=both")
    images, heat, bad = model.generate(samples)
    assert bad == [None, None] and heat[0]["after"].shape == (2, 4, SIDE, SIDE)
    text = model.family.text(["a brick"])["encoder_hidden_states"]
    assert text.shape[1] == 77 + 256 and (text[:, 77:] == 0).all()
    assert max(r for rows in model.spans(samples[0])["after"] for r in rows) < 77
    assert model.identity()["t5"] is False


def test_settings_that_a_family_does_not_take_are_refused(family, build):
    taken = build().family.takes
    for setting, value in (
        ("max_tokens", "40"),
        ("true_guidance", "2.0"),
        ("t5", "false"),
        ("negative_prompt", "a brick"),
    ):
        if setting not in taken:
            with pytest.raises(ValueError, match=f"diffusion.{setting}=.* has no effect on a "):
                build(f"diffusion.{setting}={value}")
    if family == "flux_schnell":
        with pytest.raises(ValueError, match="negative_prompt='a brick' has no effect on FLUX.1"):
            build("diffusion.negative_prompt=a brick")


def test_what_guides_nothing_is_refused(family, build):
    """Pixels would be the same, and the identity another."""
    unguided = {"z_image": "0.0"}.get(family, "1.0")
    message = {
        "flux_dev": "has no effect on FLUX.1",
        "flux_schnell": "has no effect on FLUX.1",
        "flux2_klein": "has no effect on a Flux2KleinPipeline",
    }.get(family, "has no effect with diffusion.guidance=")
    off = [f"diffusion.guidance={unguided}", "diffusion.true_guidance=1.0"]
    off = off if family == "flux_dev" else off[:1]
    with pytest.raises(ValueError, match=f"negative_prompt=.*{message}"):
        build(*off, "diffusion.negative_prompt=ugly")
    with pytest.raises(ValueError, match="capture_every=2 has no effect with diffusion.reading"):
        build("diffusion.reading=after", "diffusion.capture_every=2")
    if family == "flux_schnell":
        with pytest.raises(ValueError, match="guidance=3.0 has no effect .* distilled"):
            build("diffusion.guidance=3.0")


def test_a_distilled_klein_takes_no_guidance(family, folder, build):
    if family != "flux2_klein":
        return
    index = folder / "model_index.json"
    before = index.read_text()
    index.write_text(before.replace('"is_distilled": false', '"is_distilled": true'))
    try:
        assert index.read_text() != before
        with pytest.raises(ValueError, match="guidance=3.0 has no effect .* distilled"):
            build("diffusion.guidance=3.0")
        build("diffusion.guidance=0.0")
    finally:
        index.write_text(before)


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        ("Lumina2Pipeline", "refiners mix the words"),
        ("HunyuanImagePipeline", "refiners mix the words"),
        ("KolorsPipeline", "a family whose attention is not known here; allowed: .*FluxPipeline"),
    ],
)
def test_families_that_cannot_be_read_are_refused_by_name(tmp_path, pipeline, why):
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
    with pytest.raises(ValueError, match=f"is a {pipeline}.*{why}"):
        TextToImage(model=str(tmp_path))
