"""Stage: one piece of the training of an embedded generator, on the latents of its own window of
scenes. A piece starts from the float16 weights of the piece before, or from random ones."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch

from dd import generators as diffusion
from dd.data.datasets import encode_image
from dd.embedded.scenes import scene
from dd.prompts.prompt import make_prompt
from dd.report.charts import line_chart_svg
from dd.report.pictures import contact_sheet
from dd.store import checkpoints
from dd.store.provenance import (
    SETTINGS,
    finished_run,
    made_by,
    read_json,
    sha256,
    write_atomic,
    write_json,
)
from dd.store.samples import Sample, sample_seed
from dd.store.settings import NoResult, Settings
from dd.store.templates import fill
from dd.training.clock import hardware, seconds, timed
from dd.training.fitting import fit
from dd.training.latents import CachedData, write_latents
from dd.training.text_to_image import (
    CaptionedScenes,
    Denoising,
    JointTextToImage,
    TextToImage,
)

TEMPLATE = Path(__file__).parent / "templates" / "embedded_card.md.j2"
LAST = Path("training") / "checkpoints" / checkpoints.LAST
VAE = Path("vae") / "diffusion_pytorch_model.safetensors"
HISTORY = "training.json"  # beside the weights: all pieces so far
BINS = 24  # points of a piece's loss curve
# this package's settings for drawing with each kind
DRAWING: dict[str, dict[str, Any]] = {
    "unet": {"guidance": 3.0},
    "mmdit": {"guidance": 3.0, "scheduler": None, "t5": False, "max_tokens": 1},
}


class PieceSettings(Settings):
    """``part``: the kind of generator. ``autoencoder``: a folder with ``vae`` and ``tokenizer``
    (None = that of the piece before); ``latents``: folder for windows of latents, which both
    generators share. ``models``: the sizes. ``piece``: ``first_scene`` and number of ``scenes`` of
    its window, ``max_steps``, ``batch_size``, and settings of
    :class:`dd.training.text_to_image.TextToImageSettings`. ``usable``: train nothing; write the
    averaged weights of the newest checkpoint to ``state``."""

    noun: ClassVar[str] = "generator"
    part: Literal["unet", "mmdit"]
    models: dict[str, Any]
    piece: dict[str, Any]
    autoencoder: Annotated[str | None, NoResult("its hash is recorded")] = None
    latents: Annotated[str, NoResult("where they lie")] = "outputs/latents"
    usable: Annotated[bool, NoResult("trains nothing")] = False


def train_piece(
    folder: str | Path,
    trainer: Callable[..., Any],
    settings: PieceSettings,
    seed: int,
    init_from: str | Path | None = None,
    trained_with: dict[str, Any] | None = None,
) -> Path:
    """Write ``folder/model``, a complete folder in diffusers format whose ``training.json`` and
    card list all pieces; returns it.

    ``trainer`` and ``trained_with`` as in :func:`dd.stages.train_autoencoder.train_autoencoder`.
    ``init_from``: such a folder, whose weights the piece starts from. The optimiser is new, and its
    rate rises from 0 in the piece's ``warmup`` steps. An interrupted piece resumes from its last
    checkpoint, a folder made with other settings is refused. ``run.json`` is written last.
    """
    folder, home = Path(folder), settings.autoencoder or init_from
    if home is None:
        raise ValueError(
            "generator.autoencoder is not set: the first piece needs the folder of a training with "
            "part: autoencoder"
        )
    vae_sha, start = sha256(Path(home) / VAE), _start(settings, init_from)
    if init_from is not None and sha256(Path(init_from) / VAE) != vae_sha:
        raise ValueError(f"init_from={init_from} was trained on another VAE than that of {home}")
    identity = {
        **settings.identity(),
        "seed": seed,
        "trainer": trained_with,
        "vae_sha256": vae_sha,
        "init_from_sha256": start and start.checkpoint.sha256(),
    }
    if finished_run(folder, identity) is not None:
        return folder / "model"
    write_json(folder / SETTINGS, {"identity": identity})
    given = dict(settings.piece)
    steps, batch_size = given.pop("max_steps"), given.pop("batch_size")
    first, number = given.pop("first_scene"), given.pop("scenes")
    tokenizer = diffusion.load_tokenizer(Path(home) / "tokenizer")
    vae = diffusion.load_vae(Path(home) / "vae").float().eval()
    torch.manual_seed(seed)
    piece_seed = seed * 1_000_003 + first  # so that pieces do not repeat one another's noise
    module = _module(settings, tokenizer, start, {**given, "seed": piece_seed})
    if settings.usable:
        return _save(folder, folder / "state", module, vae, settings, init_from)
    scenes = CaptionedScenes(number, seed, first)
    window = write_latents(
        Path(settings.latents) / f"{first}-{number}-{vae_sha[:8]}",
        vae,
        scenes,
        {"vae_sha256": vae_sha, "first_scene": first, "seed": seed, "world": _world(first, seed)},
        backwards=settings.part == "mmdit",
        say=lambda line: print(line, flush=True),
    )
    data = CachedData(batch_size, window, piece_seed)
    with timed(folder, "piece"):
        fit(trainer(steps, folder / "training", True), module, data, folder / LAST)
    model = _save(folder, folder / "model", module, vae, settings, init_from)
    files = sorted(model.rglob("*.safetensors"))
    weights = {str(f.relative_to(folder)): sha256(f) for f in files}
    record = {"identity": identity, "weights_sha256": weights, **made_by()}
    write_json(folder / "run.json", record)
    return model


def _world(first: int, seed: int) -> str:
    """Identifies a world: the hash of the window's first scene."""
    s = scene("shapes", "generator", first, seed)
    return sha256(s.image.tobytes() + s.caption.encode())


def _start(settings: PieceSettings, init_from: str | Path | None) -> Any:
    """The generator of the piece before, in float32; None if there is none."""
    if init_from is None:
        return None
    start = diffusion.TextToImage(model=str(init_from), **DRAWING[settings.part])
    for part in (start.network, start.pipe.text_encoder):
        part.train()
    return start


def _module(
    settings: PieceSettings, tokenizer: Any, start: Any, given: dict[str, Any]
) -> Denoising:
    """The training of the piece, with new networks or those of ``start``."""
    models = settings.models
    if settings.part == "unet":
        scheduler = diffusion.training_scheduler(models["prediction_type"])
        if start is None:
            sizes = models["text_encoder"], models["unet"]
            text, unet = diffusion.build_text_and_unet(tokenizer, *sizes)
        else:
            text, unet = start.pipe.text_encoder, start.network
        return TextToImage(unet, text, tokenizer, scheduler, **given)
    names = "text_encoder", "text_encoder_2", "transformer"
    if start is None:
        made = diffusion.build_texts_and_transformer(tokenizer, *(models[n] for n in names))
    else:
        made = tuple(getattr(start.pipe, n).train() for n in names)
    first, second, transformer = made
    scheduler = diffusion.flow_scheduler(models["shift"])
    rows = DRAWING["mmdit"]["max_tokens"]
    return JointTextToImage(transformer, first, second, tokenizer, scheduler, rows, **given)


def _save(
    folder: Path,
    model: Path,
    module: Any,
    vae: Any,
    settings: PieceSettings,
    init_from: str | Path | None,
) -> Path:
    """The averaged weights of the newest checkpoint as a folder in diffusers format, with history
    and card. FileNotFoundError if there is no checkpoint yet."""
    path, warning = checkpoints.newest((folder / LAST).parent)
    if path is None:
        raise FileNotFoundError(f"{folder / LAST}: no checkpoint yet, so there is no usable state")
    if warning:
        print(warning, flush=True)
    held = checkpoints.load(path)
    module.load_state_dict(held["state_dict"])
    if settings.part == "unet":
        networks = module.text_encoder, module.tokenizer, module.unet
        diffusion.save_pipeline(model, vae, *networks, module.scheduler)
    else:
        texts = module.text_encoder, module.text_encoder_2
        networks = texts, module.tokenizer, module.transformer
        diffusion.save_joint_pipeline(model, vae, *networks, module.scheduler)
    home = Path(settings.autoencoder or init_from or "")
    history = Path(init_from or home, HISTORY)
    made = history if history.is_file() else home / "run.json"
    before = read_json(made)
    parts = before if isinstance(before, list) else before["parts"]
    if init_from is None:  # the autoencoder may be that of a generator in the package
        parts = [p for p in parts if p["part"] == "VAE"]
    reached, took = int(held["global_step"]), seconds(folder).get("piece")
    part = {
        "part": settings.part,
        **settings.piece,
        "reached": reached,
        "init_from_sha256": {str(f.name): sha256(f) for f in _weights(init_from)},
        "seconds": took if reached == settings.piece["max_steps"] else None,
        "hardware": hardware(),
        "loss": _loss(folder / "training", reached),
    }
    write_json(model / HISTORY, [*parts, part])
    write_card(model, settings.part)
    return model


def _weights(init_from: str | Path | None) -> list[Path]:
    parts = ("unet", "transformer")
    return (
        []
        if init_from is None
        else [f for p in parts for f in Path(init_from, p).glob("*.safetensors")]
    )


def _loss(training: Path, reached: int) -> list[list[float]]:
    """[step, mean loss since the point before] of a piece so far; for a step that was repeated,
    either log may be used."""
    logged: dict[int, float] = {}
    for path in training.glob("metrics*.csv"):
        with open(path) as file:
            rows = [r for r in csv.DictReader(file) if r.get("text_to_image/loss")]
        logged |= {int(r["step"]): float(r["text_to_image/loss"]) for r in rows}
    known = sorted((step, loss) for step, loss in logged.items() if step < reached)
    pieces = [p for p in np.array_split(np.array(known), min(BINS, len(known)) or 1) if len(p)]
    return [[int(p[-1, 0]) + 1, round(float(p[:, 1].mean()), 5)] for p in pieces]


def _samples(count: int) -> list[Sample]:
    """Prompts of scenes that were not trained on, for sample images."""
    samples = []
    for i in range(count):
        s = scene("shapes", "tune", i)
        p = make_prompt(s.caption, s.classes)
        seed = sample_seed(0, str(i))
        samples.append(Sample(str(i), p.text, p.class_prompt, p.classes, (), seed, 0))
    return samples


def write_card(model: Path, kind: str) -> None:
    """The model card beside the weights: README.md, samples.png, loss.svg (of all pieces)."""
    samples, parts = _samples(32), read_json(model / HISTORY)
    generator = diffusion.TextToImage(model=str(model), **DRAWING[kind])
    images, _, _ = generator.generate(samples, capture=False)
    rows_of_8 = [list(images[i : i + 8]) for i in range(0, len(images), 8)]
    write_atomic(model / "samples.png", encode_image(contact_sheet(rows_of_8, scale=2), ".png"))
    pieces = [p for p in parts if p["part"] == kind]
    steps, losses, done = [], [], 0
    for piece in pieces:
        steps += [done + at for at, _ in piece["loss"]]
        losses += [value for _, value in piece["loss"]]
        done += piece["reached"]
    if steps:
        chart = line_chart_svg({"loss": (steps, losses, None)}, "step", "denoising loss")
        write_atomic(model / "loss.svg", str(chart))
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    vaes = [p for p in parts if p["part"] == "VAE"]  # the last one continues those before
    vae_steps = sum(p["steps"] for p in vaes)
    values = {"size": size, "vae": vaes[-1], "vae_steps": vae_steps, "pieces": pieces}
    card = fill(TEMPLATE, kind=kind, steps=done, **values)
    write_atomic(model / "README.md", card)
