"""Stage generator in parts: tokenizer and VAE, then pieces of a UNet's or an MM-DiT's training."""

import shutil
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file

from dd import generators as diffusion
from dd.stages import train_autoencoder as first_stage
from dd.stages import train_piece as stage
from dd.store.provenance import read_json, sha256
from dd.training import latents as cache
from dd.training.segmentation import EMA, LastCheckpoint
from dd.training.text_to_image import CaptionedScenes

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
UNET = {
    "prediction_type": "v_prediction",
    "text_encoder": TEXT,
    "unet": {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
}
MMDIT = {
    "shift": 1.0,
    "text_encoder": {**TEXT, "projection_dim": 8},
    "text_encoder_2": {**TEXT, "projection_dim": 8},
    "transformer": {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    },
}
MODELS = {"unet": UNET, "mmdit": MMDIT}
VAE = {
    "sample_size": 128,
    "block_out_channels": [4, 4, 4],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}
PIECE = {"first_scene": 20, "scenes": 5, "max_steps": 3, "batch_size": 2, "learning_rate": 1e-3}
PIECE |= {"warmup": 2, "floor": 0.5}


class Stop(pl.Callback):
    """Ctrl-C after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class Steps(pl.Callback):
    """The steps that are made."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.global_step)


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("CAPTIONS", 50), ("STANDARD", 4), ("SHOWN", 16)):
            patch.setattr(first_stage, name, number)
        patch.setattr(stage, "_samples", lambda _, samples=stage._samples: samples(2))
        patch.setattr(cache, "CHUNK", 2)
        patch.setattr(cache, "BATCH", 1)
        patch.setattr(stage, "DRAWING", {k: {**v, "steps": 2} for k, v in stage.DRAWING.items()})
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory, make_trainer):
    """Tokenizer and VAE."""
    folder = tmp_path_factory.mktemp("autoencoder")
    settings = first_stage.AutoencoderSettings(
        part="autoencoder",
        models={"tokenizer_merges": 40, "max_length": 40, "vae": VAE},
        autoencoder={"max_steps": 2, "batch_size": 2, "crop": 32, "edge_weight": 1.0},
    )

    def trainer(max_steps, root, average):
        assert not average
        return make_trainer(root, max_steps, [LastCheckpoint(str(root / "checkpoints"), 1)])

    return first_stage.train_autoencoder(folder, trainer, settings, 0, 0)


@pytest.fixture
def make(make_trainer, home, tmp_path):
    """``make(part, callbacks=(), name="run", init_from=None, **piece)``: the model's folder."""

    def run(part, callbacks=(), name="run", init_from=None, usable=False, **piece):
        def trainer(max_steps, root, average):
            assert average
            parts = [EMA(0.5), LastCheckpoint(str(root / "checkpoints"), 1), *callbacks]
            log = {"logger": CSVLogger(root, name="", version=""), "log_every_n_steps": 1}
            return make_trainer(root, max_steps, parts, **log)

        settings = stage.PieceSettings(
            part=part,
            models=MODELS[part],
            piece={**PIECE, **piece},
            autoencoder=None if init_from else str(home),
            latents=str(tmp_path / "latents"),
            usable=usable,
        )
        return stage.train_piece(tmp_path / name, trainer, settings, 0, init_from)

    return run


def weights(model):
    return {str(f.relative_to(model)): sha256(f) for f in sorted(model.rglob("*.safetensors"))}


def test_both_generators_share_the_autoencoder_and_the_latents(make, home, tmp_path):
    models = {part: make(part, name=part) for part in MODELS}
    assert {(m / stage.VAE).read_bytes() for m in models.values()} == {
        (home / stage.VAE).read_bytes()
    }
    (window,) = (tmp_path / "latents").iterdir()
    assert read_json(window / "window.json")["first_scene"] == 20
    for part, model in models.items():
        made = read_json(tmp_path / part / "run.json")
        assert made["weights_sha256"] == {f"model/{k}": v for k, v in weights(model).items()}
        assert all(
            tensor.dtype == torch.float16
            for file in model.rglob("*.safetensors")
            for tensor in load_file(file).values()
        )
        history = read_json(model / "training.json")
        assert [p["part"] for p in history] == ["VAE", part]
        assert history[1]["reached"] == 3 and len(history[1]["loss"]) == 3
        card = (model / "README.md").read_text()
        assert "| 1 | 20 to 24 | 3 | 2 | 0.001 | 2 | x 0.5 |" in card
        assert ("max_sequence_length=1" in card) == (part == "mmdit")
        assert (model / "samples.png").is_file() and (model / "loss.svg").is_file()


@pytest.mark.parametrize("part", MODELS)
def test_the_folder_draws_and_gives_heat(make, part):
    model = make(part)
    after = {"reading": "after"} if part == "mmdit" else {}
    cross = {"cross_resolution": 16, "self_resolution": 32} if part == "unet" else {}
    generator = diffusion.TextToImage(
        model=str(model), **stage.DRAWING[part], **after, **cross, max_power=1
    )
    sites = [s for s in generator.sites if s.side == (32 if part == "unet" else 16)]
    assert sites and generator.size == 128 and generator.token_limit == 40
    images, heat, faults = generator.generate(stage._samples(2))
    assert images.shape == (2, 128, 128, 3) and faults == [None, None]
    side = 32 if part == "unet" else 16
    for found, sample in zip(heat, stage._samples(2), strict=True):
        assert found["class_prompt"].shape == (len(sample.classes), 2, side, side)


@pytest.mark.parametrize("part", MODELS)
def test_an_interrupted_piece_ends_with_the_same_weights(make, tmp_path, part):
    with pytest.raises(KeyboardInterrupt, match="training stopped at step 2 of 3"):
        make(part, [Stop(2)])
    assert not (tmp_path / "run/run.json").exists()
    steps = Steps()
    model = make(part, [steps])
    assert steps.seen == [3]
    assert weights(model) == weights(make(part, name="whole"))
    before = (tmp_path / "run/run.json").stat().st_mtime_ns
    assert make(part) == model and (tmp_path / "run/run.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"piece\.learning_rate: 0\.001 -> 0\.01"):
        make(part, learning_rate=0.01)


@pytest.mark.parametrize("part", MODELS)
def test_the_next_piece_begins_with_the_float16_weights(make, tmp_path, part):
    first = make(part)
    network = "unet" if part == "unet" else "transformer"
    file = f"{network}/diffusion_pytorch_model.safetensors"
    copy = tmp_path / "committed"  # whatever else lay beside it is not needed
    shutil.copytree(first, copy)
    still = make(part, name="still", init_from=str(copy), first_scene=40, learning_rate=0.0)
    for name in weights(first):  # equal numbers: a step of nothing may turn -0 into 0
        old, new = (load_file(m / name) for m in (first, still))
        assert all(torch.equal(old[k], new[k]) for k in old), name
    second = make(part, name="more", init_from=str(copy), first_scene=40)
    old, new = (load_file(m / file) for m in (first, second))
    changes = [(new[k].float() - old[k].float()).abs().max() for k in old]
    assert 0 < max(changes) < 0.01  # three steps of a thousandth, not other random weights
    assert weights(second)[str(stage.VAE)] == weights(first)[str(stage.VAE)]
    history = read_json(second / "training.json")
    assert [p["part"] for p in history] == ["VAE", part, part]
    assert history[2]["init_from_sha256"] == {
        "diffusion_pytorch_model.safetensors": weights(first)[file]
    }
    assert "| 2 | 40 to 44 | 3 |" in (second / "README.md").read_text()
    assert read_json(tmp_path / "more/run.json")["identity"]["init_from_sha256"]


def test_a_state_of_a_piece_under_way_is_usable(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        make("unet", usable=True)
    with pytest.raises(KeyboardInterrupt):
        make("unet", [Stop(2)])
    before = sha256(tmp_path / "run" / stage.LAST)
    state = make("unet", usable=True)
    assert state == tmp_path / "run/state" and sha256(tmp_path / "run" / stage.LAST) == before
    assert "| 1 | 20 to 24 | 2 of 3 |" in (state / "README.md").read_text()
    assert read_json(state / "training.json")[1]["reached"] == 2
    averaged = torch.load(tmp_path / "run" / stage.LAST, weights_only=True)["state_dict"]
    saved = load_file(state / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(averaged[f"unet.{k}"].half(), v) for k, v in saved.items())
    assert weights(make("unet")) == weights(make("unet", name="whole"))


def test_a_piece_needs_an_autoencoder(tmp_path, home):
    settings = stage.PieceSettings(part="unet", models=UNET, piece=PIECE)
    with pytest.raises(ValueError, match=r"generator\.autoencoder is not set"):
        stage.train_piece(tmp_path, None, settings, 0)
    assert not list(tmp_path.iterdir())


def test_a_piece_is_refused_on_another_autoencoder(make, tmp_path, home):
    model = make("unet")
    other = tmp_path / "other"
    shutil.copytree(home, other)
    file = other / stage.VAE
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    settings = stage.PieceSettings(
        part="unet", models=UNET, piece=PIECE, autoencoder=str(other), latents=str(tmp_path)
    )
    with pytest.raises(ValueError, match="was trained on another VAE"):
        stage.train_piece(tmp_path / "more", SimpleNamespace, settings, 0, str(model))


def test_the_autoencoder_says_how_well_it_does(home):
    made = read_json(home / "run.json")
    (part,) = made["parts"]
    assert part["part"] == "VAE" and 0 < part["error"] < 128
    assert made["weights_sha256"] == {str(stage.VAE): sha256(home / stage.VAE)}
    assert (home / "reconstructions.png").is_file()
    config = read_json(home / "vae/config.json")
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, 0.0)


def test_the_autoencoder_is_trained_further_on_new_scenes(home, make_trainer, tmp_path):
    settings = first_stage.AutoencoderSettings(
        part="autoencoder",
        models={"tokenizer_merges": 40, "max_length": 40, "vae": VAE},
        autoencoder={"max_steps": 3, "batch_size": 2, "crop": 32, "edge_weight": 1.0},
    )
    seen, draw = [], CaptionedScenes.__getitem__

    def scene(scenes, index):
        seen.append(scenes.first + index)
        return draw(scenes, index)

    def trainer(max_steps, root, average):
        return make_trainer(root, max_steps, [LastCheckpoint(str(root / "checkpoints"), 1)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionedScenes, "__getitem__", scene)
        again = first_stage.train_autoencoder(
            tmp_path / "more", trainer, settings, 0, 0, init_from=home
        )
    run = read_json(again / "run.json")
    assert [part["steps"] for part in run["parts"]] == [2, 3]
    assert seen == list(range(2 * 2, 2 * 2 + 3 * 2 + 4))
    files = [folder / first_stage.WEIGHTS for folder in (home, again)]
    assert sha256(files[0]) != sha256(files[1])
    assert run["identity"]["init_from_sha256"] == sha256(files[0])
    assert "_name_or_path" not in (again / "vae" / "config.json").read_text()
    words = [(folder / "tokenizer" / "vocab.json").read_bytes() for folder in (home, again)]
    assert words[0] == words[1]
