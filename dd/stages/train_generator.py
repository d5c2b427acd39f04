"""Stage: train the embedded Stable Diffusion from scratch on captioned scenes. Each finished
part is kept and skipped."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dd import generators as diffusion
from dd.data.datasets import encode_image
from dd.embedded.shapes import scene
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
from dd.store.settings import Settings
from dd.store.templates import fill
from dd.training.clock import hardware, seconds, timed
from dd.training.fitting import fit
from dd.training.text_to_image import Autoencoder, CaptionedData, TextToImage

TEMPLATE = Path(__file__).parent / "templates" / "generator_card.md.j2"
LAST = Path("checkpoints") / "last.ckpt"


def _captions(count: int, seed: int) -> Iterator[str]:
    for index in range(count):
        s = scene("shapes", "generator", index, seed)
        yield s.caption
        yield f"{s.caption}; {' '.join(s.classes)}"


def _images(count: int, seed: int) -> torch.Tensor:
    stack = torch.stack(
        [torch.from_numpy(scene("shapes", "generator", i, seed).image) for i in range(count)]
    )
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


class GeneratorSettings(Settings):
    """``models``: the sizes. ``autoencoder`` and ``text_to_image``: settings of both trainings,
    with ``max_steps`` and ``batch_size`` of each; ``first_scene`` of the second says which scenes
    are new to it."""

    noun: ClassVar[str] = "generator"
    models: dict[str, Any]
    autoencoder: dict[str, Any]
    text_to_image: dict[str, Any]


def train_generator(
    folder: str | Path,
    trainer: Callable[..., Any],
    settings: GeneratorSettings,
    num_workers: int,
    seed: int,
    init_from: str | Path | None = None,
    trained_with: dict[str, Any] | None = None,
) -> Path:
    """Tokenizer, VAE, then UNet with text encoder; writes ``folder/model``, a complete Stable
    Diffusion folder.

    ``trainer(max_steps, default_root_dir, average)`` makes a Lightning trainer, with averaged
    weights or without; ``trained_with`` are those of its settings that decide weights.
    ``init_from``: a Stable Diffusion folder whose tokenizer and VAE are kept and whose UNet and
    text encoder are trained further. An interrupted run goes on from its last checkpoint; a
    finished part is not trained again, a folder made with other settings is refused. ``run.json``
    is written last.
    """
    folder, models = Path(folder), settings.models
    start = None if init_from is None else diffusion.TextToImage(model=str(init_from))
    identity = {
        **dict(settings),
        "seed": seed,
        "trainer": trained_with,
        "init_from_sha256": start and start.checkpoint.sha256(),
    }
    if finished_run(folder, identity) is not None:
        return folder / "model"
    write_json(folder / SETTINGS, {"identity": identity})
    vae_settings, t2i_settings = settings.autoencoder, dict(settings.text_to_image)
    vae_steps, t2i_steps = vae_settings["max_steps"], t2i_settings.pop("max_steps")
    vae_batch, batch_size = vae_settings["batch_size"], t2i_settings.pop("batch_size")
    first_scene = t2i_settings.pop("first_scene", None) or vae_steps * vae_batch
    if start is not None:
        history = start.checkpoint.folder / "training.json"
        parts = read_json(history) if history.is_file() else []
        vae, tokenizer, unet, text_encoder = start.parts()
        unet.train(), text_encoder.train()
    else:
        vae, tokenizer = _train_vae(folder, trainer, settings, num_workers, seed)
        torch.manual_seed(seed)
        sizes = models["text_encoder"], models["unet"]
        text_encoder, unet = diffusion.build_text_and_unet(tokenizer, *sizes)

    scheduler = diffusion.training_scheduler(models["prediction_type"])
    module = TextToImage(unet, text_encoder, vae, tokenizer, scheduler, seed=seed, **t2i_settings)
    data = CaptionedData(batch_size, num_workers, seed, first=first_scene)
    training = folder / "training"
    with timed(folder, "text_to_image"):
        fit(trainer(t2i_steps, training, True), module, data, training / LAST)
    # the averaged weights; the module itself holds the raw ones when a finished training was only
    # opened again
    module.load_state_dict(checkpoints.load(training / LAST)["state_dict"])
    diffusion.save_pipeline(folder / "model", vae, text_encoder, tokenizer, unet, scheduler)
    took = seconds(folder)
    if init_from is None:
        made = {"part": "VAE", "steps": vae_steps, "batch": vae_batch, "seconds": took["vae"]}
        parts = [{**made, "hardware": hardware()}]
    parts.append(
        {
            "part": "UNet and text encoder",
            "steps": t2i_steps,
            "batch": batch_size,
            "learning_rate": t2i_settings["learning_rate"],
            "from_scene": first_scene,
            "seconds": took["text_to_image"],
            "hardware": hardware(),
        }
    )
    write_json(folder / "model" / "training.json", parts)
    write_card(folder, parts, seed)
    files = sorted((folder / "model").rglob("*.safetensors"))
    weights = {str(f.relative_to(folder)): sha256(f) for f in files}
    record = {"identity": identity, "parts": parts, "weights_sha256": weights}
    write_json(folder / "run.json", {**record, **made_by()})
    return folder / "model"


def _train_vae(
    folder: Path,
    trainer: Callable[..., Any],
    settings: GeneratorSettings,
    num_workers: int,
    seed: int,
) -> tuple[Any, Any]:
    """(trained VAE, tokenizer), from disk where they are finished."""
    models, how, done = settings.models, dict(settings.autoencoder), folder / "vae"
    merges, length = models["tokenizer_merges"], models["max_length"]
    tokenizer = diffusion.train_tokenizer(
        _captions(3000, seed), merges, folder / "tokenizer", length
    )
    torch.manual_seed(seed)
    vae = diffusion.build_vae(**models["vae"])
    if not done.exists():
        steps, batch_size = how.pop("max_steps"), how.pop("batch_size")
        module, data = Autoencoder(vae, **how), CaptionedData(batch_size, num_workers, seed)
        training = folder / "vae_training"
        with timed(folder, "vae"):
            fit(trainer(steps, training, False), module, data, training / LAST)
        vae.register_to_config(scaling_factor=diffusion.latent_scale(vae, _images(256, seed)))
        vae.save_pretrained(folder / "vae.tmp")
        (folder / "vae.tmp").rename(done)
    return diffusion.load_vae(done), tokenizer


def _samples(count: int) -> list[Sample]:
    """Prompts of scenes nobody was trained on, to look at."""
    samples = []
    for i in range(count):
        s = scene("shapes", "tune", i)
        p = make_prompt(s.caption, s.classes)
        samples.append(
            Sample(str(i), p.text, p.class_prompt, p.classes, (), sample_seed(0, str(i)), 0)
        )
    return samples


def write_card(folder: Path, parts: list[dict[str, Any]], seed: int) -> None:
    """The model card beside the weights: README.md, samples.png, loss.svg (of the last part of
    the training)."""
    model, samples = folder / "model", _samples(32)
    images, _, _ = diffusion.TextToImage(model=str(model), guidance=3.0).generate(
        samples, capture=False
    )
    rows_of_8 = [list(images[i : i + 8]) for i in range(0, len(images), 8)]
    write_atomic(model / "samples.png", encode_image(contact_sheet(rows_of_8, scale=2), ".png"))
    # an interrupted training left metrics.1.csv, metrics.2.csv, ...; of a step made twice either
    # will do
    logged: dict[int, float] = {}
    for path in (folder / "training").glob("metrics*.csv"):
        with open(path) as file:
            rows = [r for r in csv.DictReader(file) if r["text_to_image/loss"]]
        logged |= {int(r["step"]): float(r["text_to_image/loss"]) for r in rows}
    pieces = np.array_split(np.array(sorted(logged.items())), min(24, len(logged)))
    bins = [b for b in pieces if len(b)]
    series = {
        "loss": ([int(b[-1, 0]) + 1 for b in bins], [float(b[:, 1].mean()) for b in bins], None)
    }
    write_atomic(model / "loss.svg", str(line_chart_svg(series, "step", "denoising loss")))
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    lines = [
        f"| {p['part']} | {p['steps']:,} | {p['batch']} | {p['hardware']} | "
        f"{p['seconds'] / 60:.0f} minutes |"
        for p in parts
    ]
    card = fill(TEMPLATE, size=size, seed=seed, parts="\n".join(lines))
    write_atomic(model / "README.md", card)
