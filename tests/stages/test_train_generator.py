"""Stage generator: a Stable Diffusion of a few thousand parameters, from scratch and
further."""

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

from dd import generators as diffusion
from dd.stages import train_generator as stage
from dd.store.provenance import read_json, sha256
from dd.training.segmentation import EMA, LastCheckpoint

MODELS = {
    "tokenizer_merges": 20,
    "max_length": 40,
    "prediction_type": "v_prediction",
    "vae": {
        "sample_size": 64,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    "text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "unet": {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "attention_head_dim": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
}
SETTINGS = {
    "models": MODELS,
    "autoencoder": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3},
    "text_to_image": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-3},
    "num_workers": 0,
    "seed": 0,
}


class Stop(pl.Callback):
    """Ctrl-C after a step of the training that has so many."""

    def __init__(self, step, of):
        self.step, self.of = step, of

    def on_train_batch_end(self, trainer, *_):
        if (trainer.global_step, trainer.max_steps) == (self.step, self.of):
            raise KeyboardInterrupt


class Steps(pl.Callback):
    """The steps that are made."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.global_step)


@pytest.fixture(scope="module")
def few_scenes():
    """The tokenizer and the scale of the latents from fewer scenes than the recipe's."""
    with pytest.MonkeyPatch.context() as patch:
        captions, images = stage._captions, stage._images
        patch.setattr(stage, "_captions", lambda count, seed: captions(50, seed))
        patch.setattr(stage, "_images", lambda count, seed: images(4, seed))
        patch.setattr(stage, "_samples", lambda count, samples=stage._samples: samples(8))
        yield


@pytest.fixture
def make(make_trainer, few_scenes, tmp_path):
    """``make(callbacks=(), name="run", **changed settings)``: the folder of the model."""

    def run(callbacks=(), name="run", **changed):
        def trainer(max_steps, default_root_dir, average):
            parts = [EMA(0.5)] * average + [
                LastCheckpoint(str(default_root_dir / "checkpoints"), 1),
                *callbacks,
            ]
            log = {
                "logger": CSVLogger(default_root_dir, name="", version=""),
                "log_every_n_steps": 1,
            }
            return make_trainer(default_root_dir, max_steps, parts, **log)

        given = {**SETTINGS, **changed}
        settings = {k: given.pop(k) for k in stage.GeneratorSettings.model_fields}
        made = stage.GeneratorSettings(**settings)
        return stage.train_generator(tmp_path / name, trainer, made, **given)

    return run


def weights(model):
    return {str(f.relative_to(model)): sha256(f) for f in model.rglob("*.safetensors")}


def test_a_whole_model_with_its_card(make, tmp_path):
    model = make()
    made = read_json(tmp_path / "run/run.json")
    assert made["weights_sha256"] == {f"model/{name}": sha for name, sha in weights(model).items()}
    assert (
        made["identity"]["text_to_image"] == SETTINGS["text_to_image"]
        and made["identity"]["init_from_sha256"] is None
    )
    assert [(part["part"], part["steps"]) for part in made["parts"]] == [
        ("VAE", 2),
        ("UNet and text encoder", 3),
    ]
    card = (model / "README.md").read_text()
    assert (
        "| UNet and text encoder | 3 | 2 |" in card
        and (model / "samples.png").is_file()
        and (model / "loss.svg").is_file()
    )
    generator = diffusion.TextToImage(model=str(model), steps=1)
    assert (
        generator.size == 64 and generator.pipe.scheduler.config.prediction_type == "v_prediction"
    )


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(make, tmp_path):
    model = make()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert make() == model
    with pytest.raises(FileExistsError, match=r"seed: 0 -> 1"):
        make(seed=1)
    with pytest.raises(FileExistsError, match=r"text_to_image\.learning_rate: 0\.001 -> 0\.01"):
        make(text_to_image={**SETTINGS["text_to_image"], "learning_rate": 0.01})
    with pytest.raises(FileExistsError, match=r"trainer: None -> .*16-true"):
        make(trained_with={"precision": "16-true"})
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize(("step", "of"), [(1, 2), (2, 3)])  # in the VAE, in the UNet
def test_an_interrupted_run_goes_on(make, tmp_path, step, of):
    with pytest.raises(KeyboardInterrupt, match=f"training stopped at step {step} of {of}"):
        make([Stop(step, of)])
    assert not (tmp_path / "run/run.json").exists() and (tmp_path / "run/vae").exists() == (of == 3)
    steps = Steps()
    assert make([steps]) == tmp_path / "run/model"
    assert steps.seen == ([2, 1, 2, 3] if of == 2 else [3])
    assert weights(tmp_path / "run/model") == weights(
        make(name="whole")
    )  # the noise of the latents is a step's own


def test_a_model_is_trained_further(make, tmp_path):
    first = make()
    start = weights(first)
    second = make(
        name="more",
        init_from=str(first),
        text_to_image={**SETTINGS["text_to_image"], "first_scene": 99},
    )
    assert weights(first) == start
    kept = {name for name, sha in weights(second).items() if start[name] == sha}
    assert kept == {"vae/diffusion_pytorch_model.safetensors"}
    made = read_json(tmp_path / "more/run.json")
    assert [part["part"] for part in made["parts"]] == [
        "VAE",
        "UNet and text encoder",
        "UNet and text encoder",
    ]
    assert made["parts"][-1]["from_scene"] == 99 and made["identity"]["init_from_sha256"]
