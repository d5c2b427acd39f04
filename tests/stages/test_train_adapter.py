"""Stage adapt_generator on a Stable Diffusion of a few thousand parameters, and the adapter in a
pipeline."""

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

from benchmarks.reading import means, recorder_of
from dd import generators as diffusion
from dd.data.photos import find_photos
from dd.generators import TextToImage
from dd.prompts.prompt import make_prompt
from dd.stages import train_adapter as stage
from dd.store.provenance import read_json, sha256
from dd.store.samples import make_plan
from dd.taxonomy import taxonomy
from dd.training.segmentation import LastCheckpoint

SAMPLES = {"prompts": ["a photo", ""], "every": 2, "seeds": 2}
LORA = {"rank": 3, "alpha": 6, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
TRAINING = {
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "warmup": 1,
    "min_snr_gamma": 5.0,
    "caption_dropout": 0.2,
    "gradient_checkpointing": False,
}
READ = {"steps": 2, "guidance": 3.0, "max_power": 1, "cross_resolution": 8, "self_resolution": 16}


def save_model(root, prediction, side):
    words = diffusion.train_tokenizer(
        ["a photo of an apple and a gold ring"] * 9, 30, root / "tokenizer"
    )
    torch.manual_seed(side + len(prediction))
    vae = diffusion.build_vae(
        32, block_out_channels=[16, 32], norm_num_groups=8, mid_block_add_attention=False
    )
    text, unet = diffusion.build_text_and_unet(
        words,
        {
            "hidden_size": side,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": [16, 32],
            "norm_num_groups": 8,
            "attention_head_dim": [2, 4],
            "down_block_types": ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        },
    )
    diffusion.save_pipeline(
        root / "model", vae, text, words, unet, diffusion.training_scheduler(prediction)
    )
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
        Image.fromarray(pixels.astype(np.uint8)).save(
            folder / ("more" if i == 4 else "") / f"p{i}.png"
        )
    return folder


class Stop(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def adapt(models, photos, make_trainer):
    """``adapt(folder, model="v", callbacks=(), **changed)``: the adapter's file."""

    def run(folder, model="v", callbacks=(), **changed):
        def trainer(max_steps, default_root_dir, average):
            assert not average
            parts = [LastCheckpoint(str(default_root_dir / "checkpoints"), 1), *callbacks]
            log = {
                "logger": CSVLogger(default_root_dir, name="", version=""),
                "log_every_n_steps": 1,
            }
            return make_trainer(default_root_dir, max_steps, parts, **log)

        settings = {
            "images": photos,
            "listed": None,
            "captions": None,
            "template": "a photo",
            "conditions": {},
            "lora": LORA,
            "training": TRAINING,
            "max_steps": 4,
            "batch_size": 2,
            "samples": SAMPLES,
        }
        generator = TextToImage(model=str(models[model]), **READ)
        more = {k: changed.pop(k) for k in ("seed", "trained_with") if k in changed}
        given = stage.AdapterSettings(**{**settings, **changed})
        return stage.train_adapter(folder, generator, trainer, given, **more)

    return run


@pytest.fixture(scope="module")
def run(adapt, tmp_path_factory):
    """A finished run."""
    return adapt(tmp_path_factory.mktemp("outputs") / "run").parent


@pytest.fixture(scope="module")
def plan():
    prompts = [
        make_prompt("a photo of an apple and a gold ring", ("apple", "gold ring")),
        make_prompt("a tire", ("tire",)),
    ]
    return make_plan(prompts, taxonomy("shapes"), 5, 2)


def images_of(models, plan, name="v", **settings):
    return TextToImage(model=str(models[name]), **READ, **settings).generate(plan)


# The training


def test_a_run_holds_the_adapter_its_record_and_sheets(run, models, photos):
    made = read_json(run / "run.json")
    assert made["adapter_sha256"] == sha256(run / diffusion.WEIGHTS)
    assert (run / diffusion.WEIGHTS).stat().st_mode == (
        run / "run.json"
    ).stat().st_mode  # readable for the same people
    identity = made["identity"]
    assert (
        identity["base_sha256"] == TextToImage(model=str(models["v"]), **READ).checkpoint.sha256()
    )
    assert (
        identity["images"]["number"] == 5
        and identity["lora"]["rank"] == 3
        and len(identity["captions_sha256"]) == 64
    )
    assert made["supervision"] == {"labels": 0, "masks_read": False} and made["seconds"] > 0
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"step_00000{i}.png" for i in (0, 2, 4)
    ]
    first, last = (
        np.asarray(Image.open(run / "samples" / f"step_00000{i}.png")).astype(int) for i in (0, 4)
    )
    assert first.shape == last.shape and np.abs(first - last).max() > 0
    weights = load_file(run / diffusion.WEIGHTS)
    assert (
        all(k.startswith("unet.") and ".attn" in k for k in weights)
        and len(weights) == 2 * 4 * 2 * 7
    )
    assert {v.shape[0] for k, v in weights.items() if "lora_A" in k} == {3}
    assert all(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)
    with safe_open(run / diffusion.WEIGHTS, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (3, 6)


def test_checkpoints_hold_the_low_rank_layers_alone(run):
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert sum(v.numel() for v in state.values()) == read_json(run / "run.json")["parameters"]
    assert sorted(v.sum().item() for v in state.values()) == pytest.approx(
        sorted(v.sum().item() for v in load_file(run / diffusion.WEIGHTS).values())
    )


def test_an_interrupted_run_ends_with_the_same_bytes_and_a_finished_one_is_left_alone(
    adapt, run, tmp_path
):
    with pytest.raises(KeyboardInterrupt, match="training stopped at step 2 of 4"):
        adapt(tmp_path / "again", callbacks=[Stop(2)])
    assert not (tmp_path / "again/run.json").exists()
    with pytest.raises(FileNotFoundError, match="has begun and is not finished"):
        TextToImage(model="embedded", adapter=str(tmp_path / "again"))
    file = adapt(tmp_path / "again")
    assert sha256(file) == sha256(run / diffusion.WEIGHTS)
    before = {p: p.stat().st_mtime_ns for p in file.parent.rglob("*")}
    assert adapt(file.parent) == file
    with pytest.raises(FileExistsError, match=r"lora\.rank: 3 -> 2"):
        adapt(file.parent, lora={**LORA, "rank": 2})
    with pytest.raises(FileExistsError, match="captions_sha256"):
        adapt(file.parent, template="a picture")
    with pytest.raises(FileExistsError, match=r"trainer: None -> .*16-true"):
        adapt(file.parent, trained_with={"precision": "16-true"})
    assert before == {p: p.stat().st_mtime_ns for p in file.parent.rglob("*")}


def test_a_model_of_noise_is_trained_on_noise_with_recomputed_activations(adapt, tmp_path):
    training = {**TRAINING, "min_snr_gamma": None}
    plain = adapt(tmp_path / "a", "epsilon", training=training)
    again = adapt(tmp_path / "b", "epsilon", training={**training, "gradient_checkpointing": True})
    for key, value in load_file(plain).items():
        torch.testing.assert_close(load_file(again)[key], value, rtol=1e-3, atol=1e-5)


# Images and captions


def test_captions_come_from_a_file_or_from_a_template(photos, tmp_path):
    files = find_photos(photos)
    assert [f.name for f in files] == ["p4.png", "p0.png", "p1.png", "p2.png", "p3.png"]
    rows = [{"filename": f"x/p{i}.png", "caption": f"number {i}"} for i in range(4)]
    rows += [{"filename": "more/p4.png", "caption": c} for c in ("four", "vier")]
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert stage.captions_of(files, photos, path) == [
        ["four", "vier"],
        *([f"number {i}"] for i in range(4)),
    ]
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(
        ValueError,
        match=r"no caption for 4 of 5 images, such as \['more/p4.png', 'p1.png', 'p2.png'\]",
    ):
        stage.captions_of(files, photos, path)
    path.write_text(
        json.dumps({"filename": "p0.png", "caption": "here"})
    )  # another camera numbers alike
    with pytest.raises(
        ValueError, match=r"no caption for 1 of 2 images, such as \['more/p0.png'\]"
    ):
        stage.captions_of([photos / "p0.png", photos / "more/p0.png"], photos, path)
    with pytest.raises(FileNotFoundError, match="stage=caption makes one"):
        stage.captions_of(files, photos, tmp_path / "none.jsonl")
    conditions = {"place": ["indoors", "outside"], "light": ["at night"]}
    assert stage.fill("a photo {place} {light}", conditions) == [
        "a photo indoors at night",
        "a photo outside at night",
    ]
    assert stage.fill("a photo", {}) == ["a photo"]
    for template, given in (
        ("a {thing}", {}),
        ("a photo", conditions),
        ("a {place}", {"place": []}),
        ("a {", {}),
    ):
        with pytest.raises(ValueError, match=r"adapter\.(template|conditions)"):
            stage.fill(template, given)


def test_a_list_chooses_images_and_bad_files_are_named(photos, tmp_path):
    (tmp_path / "list.txt").write_text("p1\nmore/p4.png\n")
    assert [f.name for f in find_photos(photos, tmp_path / "list.txt", "adapter")] == [
        "p4.png",
        "p1.png",
    ]
    (tmp_path / "list.txt").write_text("p1\np9\n")
    with pytest.raises(ValueError, match=r"1 images are not in .*'p9'"):
        find_photos(photos, tmp_path / "list.txt", "adapter")
    with pytest.raises(FileNotFoundError, match="adapter.list"):
        find_photos(photos, tmp_path / "none.txt", "adapter")
    with pytest.raises(FileNotFoundError, match=r"no file \* with \.jpg"):
        find_photos(tmp_path)
    with pytest.raises(FileNotFoundError, match="give the folder of unlabelled photographs"):
        find_photos(None)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 1 images cannot be read[^$]*broken\.png"):
        find_photos(tmp_path)


def test_a_photograph_that_ends_early_is_left_out_with_a_warning(adapt, tmp_path, capsys):
    """Its header is sound: only decoding tells."""
    (tmp_path / "site").mkdir()
    for name in ("whole", "torn"):
        path = tmp_path / f"site/{name}.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    assert len(find_photos(tmp_path / "site")) == 2
    file = adapt(tmp_path / "run", images=tmp_path / "site")
    said = capsys.readouterr().err
    assert (
        "warning: 1 of 2 photographs cannot be read and are left out:\n" in said
        and "torn.jpg" in said
    )
    assert read_json(file.with_name("run.json"))["left_out"] == 1
    (tmp_path / "site/whole.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"none of the 1 photographs in .* can be read: .*torn\.jpg"
    ):
        adapt(tmp_path / "other", images=tmp_path / "site")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora": {**LORA, "rank": 0}}, "adapter.lora.rank=0"),
        ({"lora": {**LORA, "alpha": 0}}, "adapter.lora.alpha=0"),
        ({"lora": {**LORA, "target_modules": ["to_x"]}}, "no linear layer named to_x"),
        ({"training": {**TRAINING, "caption_dropout": 2}}, "caption_dropout=2"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"samples": {**SAMPLES, "prompts": []}}, "at least one prompt"),
        ({"template": "a photo " * 80}, "longer than the text encoder's 77 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(adapt, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        adapt(tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


# The adapter in a pipeline


def test_weight_0_makes_the_plain_images_and_weight_1_others(models, run, plan):
    plain, heat, _ = images_of(models, plan)
    none, _, _ = images_of(models, plan, adapter=str(run), adapter_weight=0.0)
    whole, adapted, _ = images_of(models, plan, adapter=str(run))
    np.testing.assert_allclose(none.astype(int), plain, atol=1)
    assert np.abs(whole.astype(int) - plain).max() > 3
    assert np.abs(adapted[0]["class_prompt"].astype(float) - heat[0]["class_prompt"]).max() > 0


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_what_is_merged_is_the_formula(models, run, weight):
    """W + weight * alpha / rank * B A of every layer that the file names; every other layer as
    it was."""
    plain = dict(TextToImage(model=str(models["v"]), **READ).network.named_parameters())
    merged = dict(
        TextToImage(
            model=str(models["v"]), **READ, adapter=str(run), adapter_weight=weight
        ).network.named_parameters()
    )
    assert plain.keys() == merged.keys()
    low = load_file(run / diffusion.WEIGHTS)
    for name, value in plain.items():
        key = f"unet.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in low:
            value = (
                value + weight * 6 / 3 * low[f"{key}.lora_B.weight"] @ low[f"{key}.lora_A.weight"]
            )
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("wrapped", [False, True])
def test_attention_with_an_adapter_is_the_formula_written_out(models, run, weight, wrapped):
    """Of one call of the UNet: softmax(Q K / sqrt(d)), with queries and keys from base and
    low-rank weights by hand, whether the adapter is merged or still beside the weights in peft's
    wrappers."""
    plain = TextToImage(model=str(models["v"]), **READ)
    base = {k: v.clone() for k, v in plain.network.state_dict().items()}
    low = load_file(run / diffusion.WEIGHTS)
    if wrapped:
        plain.pipe.load_lora_weights(str(run / diffusion.WEIGHTS), adapter_name="site")
        plain.pipe.set_adapters("site", weight)
        unet = plain.network
    else:
        unet = TextToImage(
            model=str(models["v"]), **READ, adapter=str(run), adapter_weight=weight
        ).network
    states, classes = plain.text_states(["a photo"]), plain.text_states(["apple"])
    latents, inputs = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, args[0]))
        for n, m in unet.named_modules()
        if n.endswith((".attn1", ".attn2"))
    ]
    with torch.no_grad(), recorder_of(unet, classes, 8, 16) as recorder:
        unet(latents, torch.tensor([500]), states)
    for handle in handles:
        handle.remove()

    def project(name, layer, x):
        key = f"{name}.{layer}"
        a, b = (low[f"unet.{key}.lora_{part}.weight"] for part in "AB")
        return x @ (base[f"{key}.weight"] + weight * 2.0 * b @ a).T

    def probabilities(name, x, context):
        heads = unet.get_submodule(name).heads
        q, k = (
            project(name, layer, y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, y in (("to_q", x), ("to_k", context))
        )
        return torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1).mean(1)

    own = [
        probabilities(n, x, x)
        for n, x in inputs.items()
        if n.endswith("attn1") and x.shape[1] == 16**2
    ]
    cross = [
        probabilities(n, x, classes)
        for n, x in inputs.items()
        if n.endswith("attn2") and x.shape[1] == 8**2
    ]
    assert len(own) == 3 and len(cross) == 4
    for source, each in {"self": own, "class_prompt": cross}.items():
        expected = torch.stack(each).mean(0)
        torch.testing.assert_close(means(recorder, source), expected, rtol=1e-4, atol=1e-6)


def test_the_layers_of_kohyas_format_are_merged_alike(models, run, tmp_path):
    other = {}
    for key, value in load_file(run / diffusion.WEIGHTS).items():
        layer, part = key.removeprefix("unet.").rsplit(".lora_", 1)
        name = f"lora_unet_{layer.replace('.', '_')}"
        other[f"{name}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        other[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(other, tmp_path / "kohya.safetensors")
    ours = TextToImage(model=str(models["v"]), **READ, adapter=str(run)).network.state_dict()
    theirs = TextToImage(
        model=str(models["v"]), **READ, adapter=str(tmp_path / "kohya.safetensors")
    ).network.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-6)


def test_the_identity_names_the_adapter_only_where_there_is_one(models, run):
    plain = TextToImage(model=str(models["v"]), **READ).identity()
    adapted = TextToImage(
        model=str(models["v"]), **READ, adapter=str(run / diffusion.WEIGHTS), adapter_weight=0.5
    ).identity()
    assert not any("adapter" in key for key in plain)
    added = {key: value for key, value in adapted.items() if key not in plain}
    assert added == {"adapter_sha256": sha256(run / diffusion.WEIGHTS), "adapter_weight": 0.5}
    assert all(adapted[key] == value for key, value in plain.items())


def test_fused_projections_hold_the_adapter_too(models, run, plan):
    whole, _, _ = images_of(models, plan, adapter=str(run))
    fused, _, _ = images_of(models, plan, adapter=str(run), fused_projections=True)
    np.testing.assert_allclose(fused.astype(int), whole, atol=2)


def test_an_adapter_of_another_model_is_refused(models, run, tmp_path):
    with pytest.raises(
        ValueError, match=r"was trained on other weights \(sha256 .*run\.json names"
    ):
        TextToImage(model=str(models["epsilon"]), **READ, adapter=str(run))
    alone = shutil.copy(run / diffusion.WEIGHTS, tmp_path / "alone.safetensors")
    TextToImage(
        model=str(models["epsilon"]), **READ, adapter=str(alone)
    )  # without a record its shapes decide
    with pytest.raises(ValueError, match=r"does not fit diffusion\.model: .*for a layer of"):
        TextToImage(model=str(models["wide"]), **READ, adapter=str(alone))
    state = load_file(alone)
    save_file({k.replace("down_blocks.0", "down_blocks.7"): v for k, v in state.items()}, alone)
    with pytest.raises(ValueError, match="no such layer"):
        TextToImage(model=str(models["v"]), **READ, adapter=str(alone))


def test_what_is_no_adapter_is_refused(models, run, tmp_path):
    def load(adapter, **more):
        TextToImage(model=str(models["v"]), **READ, adapter=str(adapter), **more)

    (tmp_path / "w.bin").write_bytes(b"")
    for path, error, message in (
        (tmp_path / "w.bin", ValueError, "is a pickle, which can run code"),
        (tmp_path, ValueError, r"holds only w\.bin, which can run code"),
        (tmp_path / "none", FileNotFoundError, "no such file or folder"),
        (models["v"], FileNotFoundError, f"no {diffusion.WEIGHTS} in this folder"),
        (models["v"] / "model_index.json", ValueError, "expected a run folder or a"),
        (next((models["v"] / "unet").glob("*.safetensors")), ValueError, "not part of a LoRA"),
    ):
        with pytest.raises(error, match=message):
            load(path)
    other = tmp_path / "segmenter"  # a finished run of another kind is not one that has begun
    other.mkdir()
    for name in ("settings.json", "run.json"):
        (other / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"no {diffusion.WEIGHTS} in this folder"):
        load(other)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((run / diffusion.WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as LoRA weights"):
        load(torn)
    for weight in (-1.0, float("nan"), "one", True):
        with pytest.raises(ValueError, match="adapter_weight"):
            load(run, adapter_weight=weight)
    with pytest.raises(ValueError, match="has no effect without diffusion.adapter"):
        TextToImage(model=str(models["v"]), **READ, adapter_weight=0.5)
