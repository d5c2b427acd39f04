"""Two tiny checkpoints with random weights go through the same code as the real ones: ``sd``
(32-px images, latents of 16, attention at 16 and 8) and ``xl`` (the same size, two text
encoders, no attention at the top, as in SDXL: at 8 and 4)."""

import json
import shutil

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dd import generators as diffusion
from dd.generators import TextToImage
from dd.prompts.prompt import make_prompt
from dd.store.samples import make_plan
from dd.taxonomy import taxonomy

CAPTIONS = [
    ("a photo of an apple and a gold ring", ("apple", "gold ring")),
    ("a pine tree on a plain grey background", ("pine tree",)),
    ("a tire, a brick and a heart in dark light", ("tire", "brick", "heart")),
]
SIDES = {"sd": {"cross": 8, "self": 16}, "xl": {"cross": 4, "self": 8}}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tokenizer(folder):
    return diffusion.train_tokenizer([caption for caption, _ in CAPTIONS] * 10, 30, folder)


def small_vae():
    return diffusion.build_vae(
        32, block_out_channels=[16, 32], norm_num_groups=8, mid_block_add_attention=False
    )


def sharpen(unet):
    """Queries and keys are enlarged: freshly initialised attention would be nearly uniform."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(4)
    return unet


def save_sd(root):
    words = tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    vae = small_vae()
    text, unet = diffusion.build_text_and_unet(
        words,
        TEXT,
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": [16, 32],
            "norm_num_groups": 8,
            "attention_head_dim": [2, 4],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
    )
    schedule = diffusion.training_scheduler("v_prediction")
    diffusion.save_pipeline(root / "model", vae, text, words, sharpen(unet), schedule)
    assert (
        next(unet.parameters()).dtype == torch.float32
    )  # the models that were saved are left as they were
    return root / "model"


def save_xl(root):
    words = tokenizer(root / "tokenizer")
    others = CLIPTokenizer(
        str(root / "tokenizer/vocab.json"),
        str(root / "tokenizer/merges.txt"),
        model_max_length=77,
        pad_token="!",
    )
    sizes = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    torch.manual_seed(1)
    first = CLIPTextModel(CLIPTextConfig(**TEXT, **sizes))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**{**TEXT, "hidden_size": 40}, **sizes, projection_dim=24)
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=[16, 32, 32],
        norm_num_groups=8,
        attention_head_dim=[2, 4, 4],
        transformer_layers_per_block=[1, 1, 2],
        use_linear_projection=True,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=32 + 40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    schedule = DPMSolverMultistepScheduler.from_config(
        diffusion.training_scheduler("epsilon").config
    )
    pipe = StableDiffusionXLPipeline(
        vae=small_vae(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=words,
        tokenizer_2=others,
        unet=sharpen(unet),
        scheduler=schedule,
        add_watermarker=False,
    )
    pipe.save_pretrained(root / "model", safe_serialization=True)
    return root / "model"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {
        "sd": save_sd(tmp_path_factory.mktemp("sd")),
        "xl": save_xl(tmp_path_factory.mktemp("xl")),
    }


@pytest.fixture(scope="session", params=["sd", "xl"])
def kind(request):
    return request.param


def settings_of(kind):
    sides = {f"{name}_resolution": side for name, side in SIDES[kind].items()}
    return {"steps": 2, "guidance": 3.0, "max_power": 3, **sides}


@pytest.fixture
def settings(kind):
    return settings_of(kind)


@pytest.fixture
def folder(folders, kind):
    return folders[kind]


@pytest.fixture(scope="session")
def model(folders, kind):
    return TextToImage(model=str(folders[kind]), **settings_of(kind), full_prompt=True)


@pytest.fixture(scope="session")
def sides(kind):
    """(side of the cross-attention that is read, of the self-attention)."""
    return SIDES[kind]["cross"], SIDES[kind]["self"]


@pytest.fixture(scope="session")
def captions():
    return CAPTIONS


@pytest.fixture(scope="session")
def samples():
    return make_plan(
        [make_prompt(caption, classes) for caption, classes in CAPTIONS], taxonomy("shapes"), 5, 3
    )


@pytest.fixture(scope="session")
def made(model, samples):
    return model.generate(samples)


def choose(model, monkeypatch, **settings):
    """Other settings of a loaded model, and what they choose to read, until the test ends."""
    for name in ("sites", "reading", "cross_resolution", "self_resolution"):
        monkeypatch.setattr(model, name, getattr(model, name))  # put back afterwards
    others = model.settings.model_copy(update=settings)
    for holder in (model, model.family):
        monkeypatch.setattr(holder, "settings", others)
    model._choose_sites()


@pytest.fixture
def changed(model, monkeypatch):
    """``changed(**settings)``: the loaded model with other settings, for one test."""

    def change(**settings):
        monkeypatch.setattr(model, "steps", settings.get("steps", model.steps))
        choose(model, monkeypatch, **settings)
        return model

    return change


@pytest.fixture
def hooks(model):
    """``hooks()``: how many there are on the network now."""
    return lambda: sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.network.modules()
    )


@pytest.fixture
def edited(folders, tmp_path):
    """``edited(kind, index)``: a copy of a checkpoint to damage, with these entries in its
    model_index.json."""

    def copy(kind="sd", **index):
        target = tmp_path / "copy"
        shutil.copytree(folders[kind], target)
        path = target / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
        return target

    return copy
