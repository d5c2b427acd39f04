"""Stage: train the embedded Stable Diffusion from scratch on captioned scenes. Each finished
part is kept and skipped."""

import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    read_own,
    sha256,
    write_atomic,
    write_json,
)
from dd.store.samples import Sample, sample_seed
from dd.store.templates import fill
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


def train_generator(
    folder: str | Path,
    trainer: Trainers,
    models: dict[str, Any],
    autoencoder: dict[str, Any],
    text_to_image: dict[str, Any],
    num_workers: int,
    seed: int,
    init_from: str | Path | None = None,
    trained_with: dict[str, Any] | None = None,
) -> Path:
    """Tokenizer, VAE, then UNet with text encoder; writes ``folder/model``, a complete Stable
    Diffusion folder.

    ``trainer(max_steps, default_root_dir, average)`` makes a Lightning trainer, with averaged
    weights or without; ``trained_with`` are those of its settings that decide weights. ``models``
    holds the sizes, ``autoencoder`` and ``text_to_image`` settings, ``max_steps`` and
    ``batch_size`` of each. ``init_from``: a Stable Diffusion folder whose tokenizer and VAE are
    kept and whose UNet and text encoder are trained further; ``text_to_image.first_scene`` then
    says which scenes are new to it. An interrupted run goes on from its last checkpoint; a finished
    part is not trained again, a folder made with other settings is refused. ``run.json`` is written
    last.
    """
    folder = Path(folder)
    identity = {
        "models": models,
        "autoencoder": autoencoder,
        "text_to_image": text_to_image,
        "seed": seed,
    }
    identity["trainer"] = trained_with
    start = None if init_from is None else diffusion.StableDiffusion(model=init_from)
    identity["init_from_sha256"] = start and start.checkpoint.sha256()
    if finished_run(folder, identity) is not None:
        return folder / "model"
    write_json(folder / SETTINGS, {"identity": identity})
    vae_settings, t2i_settings = dict(autoencoder), dict(text_to_image)
    vae_steps, t2i_steps = vae_settings.pop("max_steps"), t2i_settings.pop("max_steps")
    vae_batch, batch_size = vae_settings.pop("batch_size"), t2i_settings.pop("batch_size")
    first_scene = t2i_settings.pop("first_scene", None) or vae_steps * vae_batch
    if start is not None:
        history = start.checkpoint.folder / "training.json"
        parts = read_json(history) if history.is_file() else []
        start = start.pipe
        vae, tokenizer, unet, text_encoder = (
            start.vae,
            start.tokenizer,
            start.unet,
            start.text_encoder,
        )
        unet.train(), text_encoder.train()
    else:
        vae, tokenizer = _train_vae(
            folder, trainer, models, vae_settings, vae_steps, vae_batch, num_workers, seed
        )
        torch.manual_seed(seed)
        text_encoder, unet = diffusion.build_text_and_unet(
            tokenizer, models["text_encoder"], models["unet"]
        )

    scheduler = diffusion.training_scheduler(models["prediction_type"])
    module = TextToImage(unet, text_encoder, vae, tokenizer, scheduler, seed=seed, **t2i_settings)
    data, last = (
        CaptionedData(batch_size, num_workers, seed, first=first_scene),
        folder / "training" / LAST,
    )
    with _timed(folder, "text_to_image"):
        fit(
            trainer(max_steps=t2i_steps, default_root_dir=folder / "training", average=True),
            module,
            data,
            last,
        )
    # the averaged weights; the module itself holds the raw ones when a finished training was only
    # opened again
    module.load_state_dict(checkpoints.load(last)["state_dict"])
    diffusion.save_pipeline(folder / "model", vae, text_encoder, tokenizer, unet, scheduler)
    seconds, hardware = (
        read_own(folder / "seconds.json", {"vae?": float, "text_to_image": float}),
        _hardware(),
    )
    if init_from is None:
        parts = [
            {
                "part": "VAE",
                "steps": vae_steps,
                "batch": vae_batch,
                "seconds": seconds["vae"],
                "hardware": hardware,
            }
        ]
    settings = {
        "steps": t2i_steps,
        "batch": batch_size,
        "learning_rate": t2i_settings["learning_rate"],
        "from_scene": first_scene,
    }
    parts.append(
        {
            "part": "UNet and text encoder",
            **settings,
            "seconds": seconds["text_to_image"],
            "hardware": hardware,
        }
    )
    write_json(folder / "model" / "training.json", parts)
    write_card(folder, parts, seed)
    weights = {
        str(f.relative_to(folder)): sha256(f)
        for f in sorted((folder / "model").rglob("*.safetensors"))
    }
    write_json(
        folder / "run.json",
        {"identity": identity, "parts": parts, "weights_sha256": weights, **made_by()},
    )
    return folder / "model"


def _hardware() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores, no GPU"
    )


def _train_vae(
    folder: str | Path,
    trainer: Trainers,
    models: dict[str, Any],
    vae_settings: dict[str, Any],
    vae_steps: int,
    vae_batch: int,
    num_workers: int,
    seed: int,
) -> tuple[Any, Any]:
    """(trained VAE, tokenizer), from disk where they are finished."""
    tokenizer = diffusion.train_tokenizer(
        _captions(3000, seed),
        models["tokenizer_merges"],
        folder / "tokenizer",
        models["max_length"],
    )

    torch.manual_seed(seed)
    vae = diffusion.build_vae(**models["vae"])
    vae_done = folder / "vae"
    if not vae_done.exists():
        module, data = Autoencoder(vae, **vae_settings), CaptionedData(vae_batch, num_workers, seed)
        training = folder / "vae_training"
        with _timed(folder, "vae"):
            fit(
                trainer(max_steps=vae_steps, default_root_dir=training, average=False),
                module,
                data,
                training / LAST,
            )
        vae.register_to_config(scaling_factor=diffusion.latent_scale(vae, _images(256, seed)))
        vae.save_pretrained(folder / "vae.tmp")
        (folder / "vae.tmp").rename(vae_done)
    return diffusion.load_vae(vae_done), tokenizer


class _timed:
    """Adds the seconds of a part to ``seconds.json``; an interrupted part counts with what it
    used."""

    def __init__(self, folder: Path, part: str) -> None:
        self.path, self.part = folder / "seconds.json", part

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = read_own(self.path, {"*": float}) if self.path.exists() else {}
        seconds[self.part] = seconds.get(self.part, 0) + time.perf_counter() - self.started
        write_json(self.path, seconds)


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
    images, _, _ = diffusion.StableDiffusion(model=str(model), guidance=3.0).generate(
        samples, capture=False
    )
    rows = [list(images[i : i + 8]) for i in range(0, len(images), 8)]
    write_atomic(model / "samples.png", encode_image(contact_sheet(rows, scale=2), ".png"))
    # an interrupted training left metrics.1.csv, metrics.2.csv, ...; of a step made twice either
    # will do
    logged = {}
    for path in (folder / "training").glob("metrics*.csv"):
        with open(path) as file:
            logged |= {
                int(r["step"]): float(r["text_to_image/loss"])
                for r in csv.DictReader(file)
                if r["text_to_image/loss"]
            }
    bins = [
        b for b in np.array_split(np.array(sorted(logged.items())), min(24, len(logged))) if len(b)
    ]
    series = {
        "loss": ([int(b[-1, 0]) + 1 for b in bins], [float(b[:, 1].mean()) for b in bins], None)
    }
    write_atomic(model / "loss.svg", str(line_chart_svg(series, "step", "denoising loss")))
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    rows = "\n".join(
        f"| {p['part']} | {p['steps']:,} | {p['batch']} | {p['hardware']} | "
        f"{p['seconds'] / 60:.0f} minutes |"
        for p in parts
    )
    card = fill(TEMPLATE, size=size, seed=seed, parts=rows)
    write_atomic(model / "README.md", card)
