"""A tiny Stable Diffusion with random weights goes through the same code as the real one: 32-px images, latents of 16 px,
attention at 16 and 8."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from dd import diffusion
from dd.diffusion import AttentionRecorder, StableDiffusion
from dd.prompts import make_prompt
from dd.samples import make_plan
from dd.taxonomy import taxonomy

CAPTIONS = [
    ("a photo of an apple and a gold ring", ("apple", "gold ring")),
    ("a pine tree on a plain grey background", ("pine tree",)),
    ("a tire, a brick and a heart in dark light", ("tire", "brick", "heart")),
]
SETTINGS = {"steps": 2, "guidance": 3.0, "cross_resolution": 8, "self_resolution": 16, "max_power": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline. Queries and keys are enlarged: freshly initialised attention would be nearly uniform."""
    root = tmp_path_factory.mktemp("model")
    tokenizer = diffusion.train_tokenizer([caption for caption, _ in CAPTIONS] * 10, 30, root / "tokenizer")
    torch.manual_seed(0)
    vae = diffusion.build_vae(32, block_out_channels=[16, 32], norm_num_groups=8, mid_block_add_attention=False)
    text, unet = diffusion.build_text_and_unet(
        tokenizer,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        {
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 32],
            "norm_num_groups": 8, "attention_head_dim": [2, 4],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(4)
    diffusion.save_pipeline(root / "model", vae, text, tokenizer, unet, diffusion.training_scheduler("v_prediction"))
    assert next(unet.parameters()).dtype == torch.float32  # the models that were saved are left as they were
    return root / "model"


@pytest.fixture(scope="module")
def model(folder):
    return StableDiffusion(str(folder), **SETTINGS, full_prompt=True)


@pytest.fixture(scope="module")
def samples():
    return make_plan([make_prompt(caption, classes) for caption, classes in CAPTIONS], taxonomy("shapes"), 5, 3)


@pytest.fixture(scope="module")
def made(model, samples):
    return model.generate(samples)


def changed(model, monkeypatch, **kwargs):
    """The same loaded model with other settings."""
    for key, value in kwargs.items():
        monkeypatch.setattr(model, key, value)
    return model


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.pipe.unet.modules())


# What is made


def test_images_and_heat_have_their_form(made, samples):
    images, heat = made
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 5
    assert len(heat) == 3
    for sample, maps in zip(samples, heat, strict=True):
        assert maps.keys() == {"class_prompt", "full_prompt"}
        for stored in maps.values():
            assert stored.shape == (len(sample.classes), 4, 16, 16) and stored.dtype == np.float16
            assert np.isfinite(stored).all() and (stored[:, 0].max((1, 2)) > stored[:, 0].min((1, 2))).all()


def test_capture_does_not_change_a_bit_of_the_image(model, made, samples):
    images, heat = model.generate(samples, capture=False)
    assert images.tobytes() == made[0].tobytes()
    assert heat == []


def test_the_same_seeds_give_the_same_bytes(model, made, samples):
    torch.manual_seed(99)
    images, heat = model.generate(samples)
    assert images.tobytes() == made[0].tobytes()
    for a, b in zip(heat, made[1], strict=True):
        assert all(a[source].tobytes() == b[source].tobytes() for source in a)


def test_each_sample_has_its_own_noise(model, made):
    twins = make_plan([make_prompt(*CAPTIONS[0])] * 2, taxonomy("shapes"), 5, 2)
    images, _ = model.generate(twins)
    assert np.abs(images[0].astype(int) - images[1]).mean() > 1
    np.testing.assert_allclose(images[0].astype(int), made[0][0], atol=2)  # id 000000 in both plans


def test_a_sample_does_not_depend_on_its_place_in_the_batch(model, made, samples):
    for order in ([2, 0, 1], [1]):
        images, heat = model.generate([samples[i] for i in order])
        for place, i in enumerate(order):
            np.testing.assert_allclose(images[place].astype(int), made[0][i], atol=2)
            for source, stored in heat[place].items():
                np.testing.assert_allclose(stored, made[1][i][source], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_without_guidance_the_batch_is_not_doubled(model, samples, monkeypatch, guidance):
    changed(model, monkeypatch, guidance=guidance)
    sizes = []
    handle = model.pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    images, heat = model.generate(samples)
    handle.remove()
    assert sizes == [3, 3]
    assert images.shape == (3, 32, 32, 3) and [len(h["class_prompt"]) for h in heat] == [2, 1, 3]


# The attention that is read


class Explicit:
    """An attention processor that writes the formula out, one head at a time, and keeps the probabilities."""

    def __init__(self, class_states, kept):
        self.class_states, self.kept = class_states, kept

    @staticmethod
    def probabilities(attn, hidden, context):
        width = attn.to_q.out_features // attn.heads
        found = []
        for h in range(attn.heads):
            part = slice(h * width, (h + 1) * width)
            q, k = (F.linear(x, layer.weight[part]) for x, layer in ((hidden, attn.to_q), (context, attn.to_k)))
            found.append(torch.softmax(q @ k.transpose(1, 2) / width**0.5, -1))
        return torch.stack(found, 1)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        count, length = len(self.class_states), hidden_states.shape[1]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attention = self.probabilities(attn, hidden_states, context)
        values = attn.to_v(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        if encoder_hidden_states is None and length == 16 * 16:
            self.kept.setdefault("self", []).append(attention[-count:].mean(1))
        if encoder_hidden_states is not None and length == 8 * 8:
            self.kept.setdefault("full_prompt", []).append(attention[-count:].mean(1))
            from_classes = self.probabilities(attn, hidden_states[-count:], self.class_states)
            self.kept.setdefault("class_prompt", []).append(from_classes.mean(1))
        return attn.to_out[0]((attention @ values).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def observed(model, samples):
    """(attention kept by the explicit processor, the recorder) of one and the same generation."""
    tokens = model.pipe.tokenizer([s.class_prompt for s in samples], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        class_states = model.pipe.text_encoder(tokens.input_ids).last_hidden_state
    before, kept = model.pipe.unet.attn_processors, {}
    model.pipe.unet.set_attn_processor(Explicit(class_states, kept))
    with AttentionRecorder(model.pipe.unet, class_states, 8, 16, full_prompt=True) as recorder:
        images, _ = model.generate(samples, capture=False)
    model.pipe.unet.set_attn_processor(before)
    return {key: torch.stack(each) for key, each in kept.items()}, recorder, images


def test_the_explicit_processor_makes_the_same_image(observed, made):
    np.testing.assert_allclose(observed[2].astype(int), made[0], atol=2)


def test_recorded_attention_is_the_mean_over_heads_layers_and_steps(observed):
    kept, recorder, _ = observed
    assert len(kept["self"]) == 2 * (1 + 2) and len(kept["class_prompt"]) == 2 * (1 + 1 + 2)  # steps x (down, mid, up)
    torch.testing.assert_close(recorder.self_attention, kept["self"].mean(0), rtol=1e-4, atol=1e-6)
    assert recorder.cross.keys() == {"class_prompt", "full_prompt"}
    for source, recorded in recorder.cross.items():
        torch.testing.assert_close(recorded, kept[source].mean(0), rtol=1e-4, atol=1e-6)
    assert (recorder.cross["class_prompt"] - recorder.cross["full_prompt"]).abs().max() > 1e-3


def test_rows_of_recorded_attention_are_distributions(observed):
    _, recorder, _ = observed
    for recorded, shape in (*((x, (3, 64, 77)) for x in recorder.cross.values()), (recorder.self_attention, (3, 256, 256))):
        assert recorded.shape == shape and (recorded >= 0).all()
        torch.testing.assert_close(recorded.sum(-1), torch.ones(shape[:2]))


def test_heat_follows_from_the_attention_by_the_papers_formula(observed, made, model, samples):
    kept, _, _ = observed
    for i, sample in enumerate(samples):
        power = kept["self"].mean(0)[i]
        for source, spans in model.spans(sample).items():
            cross = kept[source].mean(0)[i]
            for k, positions in enumerate(spans):
                start = cross[:, positions].mean(1).view(1, 1, 8, 8)
                start = F.interpolate(start, size=(16, 16), mode="bicubic").flatten()
                for p in range(4):
                    expected = (torch.linalg.matrix_power(power, p) @ start).view(16, 16)
                    np.testing.assert_allclose(made[1][i][source][k, p], expected, rtol=3e-3, atol=1e-5)


def test_only_the_class_prompt_is_read_unless_more_is_asked_for(model, made, samples, monkeypatch):
    _, heat = changed(model, monkeypatch, full_prompt=False).generate(samples)
    for maps, before in zip(heat, made[1], strict=True):
        assert maps.keys() == {"class_prompt"}
        assert maps["class_prompt"].tobytes() == before["class_prompt"].tobytes()


def test_hooks_are_gone_afterwards(model, samples, monkeypatch):
    assert hooks(model) == 0
    model.generate(samples)
    assert hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), AttentionRecorder(model.pipe.unet, torch.zeros(1, 77, 32), 8, 16):
        assert hooks(model) == 14  # self and cross in 2 layers down, 1 in the middle, 4 up
        raise KeyboardInterrupt
    assert hooks(model) == 0

    def broken(*_, **__):
        raise RuntimeError("the scheduler stopped")

    monkeypatch.setattr(model.pipe.scheduler, "step", broken)
    with pytest.raises(RuntimeError, match="the scheduler stopped"):
        model.generate(samples)
    assert hooks(model) == 0


@pytest.mark.parametrize(("kind", "wanted"), [("cross", 16), ("cross", 32), ("self", 32), ("self", 8)])
def test_resolutions(model, samples, monkeypatch, kind, wanted):
    changed(model, monkeypatch, **{f"{kind}_resolution": wanted}, steps=5)
    calls = []
    handle = model.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        if wanted != 32:
            side = model.self_resolution
            assert model.generate(samples)[1][0]["class_prompt"].shape == (2, 4, side, side)
        else:
            message = rf"diffusion\.{kind}_resolution=32: this model has no {kind}-attention there; it has \[8, 16\]\. Layers:"
            with pytest.raises(ValueError, match=message) as error:
                model.generate(samples)
            for layer in (
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1 at 16",
                "mid_block.attentions.0.transformer_blocks.0.attn2 at 8",
            ):
                assert layer in str(error.value)
            assert len(calls) == 1  # found at the first step, not after the whole image
    finally:
        handle.remove()
    assert hooks(model) == 0


def test_a_network_without_attention_is_named():
    with AttentionRecorder(torch.nn.Linear(2, 2), torch.zeros(1, 77, 32), 8, 16) as recorder:
        pass
    with pytest.raises(ValueError, match="no attention was captured: Linear"):
        recorder.check()


# Real images


def test_heat_of_real_images(model, samples):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    heat = model.read_real(images, samples, [50, 350])
    for sample, maps in zip(samples, heat, strict=True):
        assert maps.keys() == {"class_prompt", "full_prompt"}
        assert all(m.shape == (len(sample.classes), 4, 16, 16) and m.dtype == np.float16 for m in maps.values())
    again = model.read_real(images, samples, [50, 350])
    assert all(a["class_prompt"].tobytes() == b["class_prompt"].tobytes() for a, b in zip(heat, again, strict=True))
    other = model.read_real(images[::-1].copy(), samples, [50, 350])
    assert np.abs(other[0]["class_prompt"].astype(float) - heat[0]["class_prompt"]).max() > 1e-4
    assert hooks(model) == 0


# Prompts


def test_spans_point_at_the_class_words(model, samples):
    for sample in samples:
        for text, positions in zip((sample.class_prompt, sample.prompt), model.spans(sample).values(), strict=True):
            ids = model.pipe.tokenizer(text).input_ids
            spelled = [model.pipe.tokenizer.decode([ids[p] for p in span]).strip() for span in positions]
            assert spelled == list(sample.classes)
        assert model.spans(sample)["full_prompt"][0][0] > len(model.pipe.tokenizer(sample.prompt.split(";")[0]).input_ids) - 2


def sample_of(caption, classes, append=True):
    return make_plan([make_prompt(caption, classes, append)], taxonomy("shapes"), 0, 1)[0]


def test_a_class_missing_from_the_full_prompt(model, monkeypatch):
    sample = sample_of("a round thing", ["tire"], append=False)
    with pytest.raises(ValueError, match=r"class \['tire'\] is missing from its prompt 'a round thing'"):
        model.generate([sample])
    assert model.generate([sample_of("a round tire", ["tire"], append=False)])[1][0]["full_prompt"].shape == (1, 4, 16, 16)
    changed(model, monkeypatch, full_prompt=False)
    assert model.generate([sample])[1][0].keys() == {"class_prompt"}  # the class prompt alone has the word


def test_a_class_beyond_the_token_limit(model):
    with pytest.raises(ValueError, match=r"class 'tire' is cut off: .*text encoder's 77 tokens. Shorten"):
        model.generate([sample_of("a photo of a " + "very " * 80 + "round thing", ["tire"])])


# Loading


def test_the_folder_holds_half_precision_safetensors_and_no_pickle(folder):
    assert {p.parent.name for p in folder.rglob("*.safetensors")} == {"unet", "vae", "text_encoder"}
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert {p.suffix for p in (folder / "tokenizer").iterdir()} >= {".json"}
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_settings_reach_the_pipeline(folder):
    model = StableDiffusion(str(folder), **SETTINGS, scheduler="EulerDiscreteScheduler", dtype="bfloat16", size=48)
    assert type(model.pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert model.pipe.scheduler.config.prediction_type == "v_prediction"
    assert model.pipe.unet.dtype == model.pipe.vae.dtype == torch.bfloat16
    assert model.size == 48
    assert StableDiffusion(str(folder), scheduler=None).size == 32


def test_the_identity_is_plain_and_tells_models_apart(folder, tmp_path, model):
    identity = model.identity()
    assert json.loads(json.dumps(identity)) == identity  # what run.json gives back is equal
    assert identity == model.identity()
    assert {"steps": 2, "guidance": 3.0, "device": "cpu", "threads": torch.get_num_threads()}.items() <= identity.items()
    other = StableDiffusion(str(folder), **{**SETTINGS, "guidance": 4.0}, full_prompt=True).identity()
    assert {k for k in identity if identity[k] != other[k]} == {"guidance"}
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    other = StableDiffusion(str(tmp_path / "copy"), **SETTINGS, full_prompt=True).identity()
    assert {k for k in identity if identity[k] != other[k]} == {"weights_sha256", "model"}


def test_a_missing_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"diffusion\.model=.*nowhere.*no such folder\. Give 'embedded', a local folder"
    ):
        StableDiffusion(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        StableDiffusion("nowhere")


def test_a_folder_in_another_format(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model_index.json; is it in diffusers format"):
        StableDiffusion(str(tmp_path))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_are_refused(folder, tmp_path, part):
    shutil.copytree(folder, tmp_path / "copy")
    (weights,) = (tmp_path / "copy" / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=rf"{part} holds no safetensors weights, only pickles \['.*\.bin'\].*can run code"):
        StableDiffusion(str(tmp_path / "copy"))
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=rf"{part} holds no safetensors weights\. Give a folder"):
        StableDiffusion(str(tmp_path / "copy"))


def test_an_unknown_scheduler(folder):
    with pytest.raises(
        ValueError, match=r"diffusion\.scheduler='DDIM'; allowed for this model: .*DDIMScheduler, .*EulerDiscreteScheduler"
    ):
        StableDiffusion(str(folder), scheduler="DDIM")


def test_an_unknown_precision(folder):
    with pytest.raises(ValueError, match="diffusion.dtype='half'; allowed: float32, float16, bfloat16"):
        StableDiffusion(str(folder), dtype="half")


def test_a_hub_id_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise OSError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(
        FileNotFoundError, match=r"'someone/model' could not be loaded: cannot reach the hub\nA hub id needs a network"
    ):
        StableDiffusion("someone/model")


# Building


def test_the_tokenizer_is_the_same_every_time(tmp_path):
    captions = [caption for caption, _ in CAPTIONS]
    for name in "abc":
        diffusion.train_tokenizer(captions, 20, tmp_path / name)
    for file in ("vocab.json", "merges.txt"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_the_tokenizer_reads_like_clips(tmp_path):
    made = diffusion.train_tokenizer([caption for caption, _ in CAPTIONS], 20, tmp_path, max_length=12)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("A Photo of  an APPLE!", "it's 42 猫é", ""):
        assert loaded(text).input_ids == made(text).input_ids
    ids = loaded("an apple", padding="max_length").input_ids
    assert len(ids) == 12 and ids[0] == loaded.bos_token_id and ids[-1] == loaded.eos_token_id == loaded.pad_token_id
    assert loaded.decode(ids, skip_special_tokens=True).strip() == "an apple"
    assert max(loaded.get_vocab().values()) + 1 == len(loaded) == 2 * 256 + 20 + 2


def test_latents_are_scaled_to_unit_variance(folder):
    vae = diffusion.load_vae(folder / "vae").float()
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = diffusion.latent_scale(vae, images)
    with torch.no_grad():
        assert float((vae.encode(images).latent_dist.mean * scale).std()) == pytest.approx(1, abs=1e-3)


def test_the_noise_schedule_is_that_of_stable_diffusion():
    scheduler = diffusion.training_scheduler("epsilon")
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)
    assert scheduler.config.prediction_type == "epsilon"
