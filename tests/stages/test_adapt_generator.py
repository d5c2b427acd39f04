"""Stage adapt_generator on a Stable Diffusion of a few thousand parameters, and the adapter in a pipeline."""

import json
import shutil

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dd import diffusion
from dd.diffusion import AttentionRecorder, StableDiffusion
from dd.prompts import make_prompt
from dd.provenance import read_json, sha256
from dd.samples import make_plan
from dd.segmentation import LastCheckpoint
from dd.stages import adapt_generator as stage
from dd.taxonomy import taxonomy

SAMPLES = {"prompts": ["a photo", ""], "every": 2, "seeds": 2}
LORA = {"rank": 3, "alpha": 6, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
TRAINING = {
    "learning_rate": 1e-2, "weight_decay": 0.0, "warmup": 1, "min_snr_gamma": 5.0, "caption_dropout": 0.2,
    "gradient_checkpointing": False,
}  # fmt: skip
READ = {"steps": 2, "guidance": 3.0, "max_power": 1, "cross_resolution": 8, "self_resolution": 16}


def save_model(root, prediction, side):
    words = diffusion.train_tokenizer(["a photo of an apple and a gold ring"] * 9, 30, root / "tokenizer")
    torch.manual_seed(side)
    vae = diffusion.build_vae(32, block_out_channels=[16, 32], norm_num_groups=8, mid_block_add_attention=False)
    text, unet = diffusion.build_text_and_unet(
        words, {"hidden_size": side, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 32],
            "norm_num_groups": 8, "attention_head_dim": [2, 4],
            "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        },
    )  # fmt: skip
    diffusion.save_pipeline(root / "model", vae, text, words, unet, diffusion.training_scheduler(prediction))
    return root / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``v``, ``epsilon`` (of equal shapes) and ``wide`` (another text encoder)."""
    kinds = {"v": ("v_prediction", 32), "epsilon": ("epsilon", 32), "wide": ("v_prediction", 40)}
    return {name: save_model(tmp_path_factory.mktemp(name), *kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five reddish photographs of several sizes, one in a folder of its own."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for i, (height, width) in enumerate([(40, 50), (32, 32), (90, 33), (20, 64), (48, 48)]):
        pixels = rng.integers(0, 90, (height, width, 3)) + [160, 0, 0]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / ("more" if i == 4 else "") / f"p{i}.png")
    return folder


class Stop(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def adapt(models, photos):
    """``adapt(folder, model="v", callbacks=(), **changed)``: the adapter's file."""
    from tests_conftest import quiet_trainer

    def run(folder, model="v", callbacks=(), **changed):
        def trainer(max_steps, default_root_dir, average):
            assert not average
            parts = [LastCheckpoint(str(default_root_dir / "checkpoints"), 1), *callbacks]
            log = {"logger": CSVLogger(default_root_dir, name="", version=""), "log_every_n_steps": 1}
            return quiet_trainer(default_root_dir, max_steps, parts, **log)

        settings = {
            "images": photos, "listed": None, "captions": None, "template": "a photo", "conditions": {}, "lora": LORA,
            "training": TRAINING, "max_steps": 4, "batch_size": 2, "samples": SAMPLES,
        }  # fmt: skip
        generator = StableDiffusion(str(models[model]), **READ)
        return stage.adapt_generator(folder, generator, trainer, **{**settings, **changed})

    return run


@pytest.fixture(scope="module")
def run(adapt, tmp_path_factory):
    """A finished run."""
    return adapt(tmp_path_factory.mktemp("outputs") / "run").parent
