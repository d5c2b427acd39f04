"""Stage: train the tokenizer and the VAE of the embedded generators, on captioned scenes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from dd import generators as diffusion
from dd.data.datasets import encode_image
from dd.embedded.scenes import scene
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
from dd.store.settings import Settings
from dd.training.clock import hardware, seconds, timed
from dd.training.fitting import fit
from dd.training.text_to_image import Autoencoder, CaptionedData, CaptionedScenes

LAST = Path("training") / "checkpoints" / checkpoints.LAST
CAPTIONS, STANDARD, SHOWN = 3000, 256, 64  # scenes for the tokenizer, the latents' scale, the error
WEIGHTS = Path("vae") / "diffusion_pytorch_model.safetensors"


class AutoencoderSettings(Settings):
    """``models``: ``tokenizer_merges``, ``max_length`` of a text in tokens and the sizes of the
    ``vae``. ``autoencoder``: settings of its training, with ``max_steps`` and ``batch_size``."""

    noun: ClassVar[str] = "generator"
    part: Literal["autoencoder"]
    models: dict[str, Any]
    autoencoder: dict[str, Any]


def train_autoencoder(
    folder: str | Path,
    trainer: Callable[..., Any],
    settings: AutoencoderSettings,
    num_workers: int,
    seed: int,
    init_from: str | Path | None = None,
    trained_with: dict[str, Any] | None = None,
) -> Path:
    """Write ``folder/tokenizer``, ``folder/vae`` (float16, its latents standardised) and
    ``reconstructions.png``: scenes of ``tune`` above their reconstructions.

    ``trainer(max_steps, default_root_dir, average)`` makes a Lightning trainer, with averaged
    weights or without; ``trained_with`` are those of its settings that decide weights.
    ``init_from``: such a folder, whose VAE is trained further on new scenes with a new optimiser.
    An interrupted training resumes from its last checkpoint; a folder made with other settings is
    refused. ``run.json``, with the error in grey levels, is written last.
    """
    folder, models, how = Path(folder), settings.models, dict(settings.autoencoder)
    before = [] if init_from is None else read_json(Path(init_from, "run.json"))["parts"]
    identity = {
        **dict(settings),
        "seed": seed,
        "trainer": trained_with,
        **({"init_from_sha256": sha256(Path(init_from, WEIGHTS))} if init_from else {}),
    }
    if finished_run(folder, identity) is not None:
        return folder
    write_json(folder / SETTINGS, {"identity": identity})
    texts = (text for i in range(CAPTIONS) for text in _texts(i, seed))
    length = models["max_length"]
    diffusion.train_tokenizer(texts, models["tokenizer_merges"], folder / "tokenizer", length)
    torch.manual_seed(seed)
    steps, batch_size = how.pop("max_steps"), how.pop("batch_size")
    first = sum(part["steps"] * part["batch"] for part in before)
    if init_from is None:
        vae = diffusion.build_vae(**models["vae"])
    else:
        vae = diffusion.load_vae(Path(init_from, "vae")).float().train()
    module = Autoencoder(vae, **how)
    data = CaptionedData(batch_size, num_workers, seed, first)
    with timed(folder, "vae"):
        fit(trainer(steps, folder / "training", False), module, data, folder / LAST)
    module.load_state_dict(checkpoints.load(folder / LAST)["state_dict"])
    vae.eval()
    some = CaptionedScenes(STANDARD, seed, first + steps * batch_size)  # unseen by the VAE
    diffusion.standardise_latents(vae, torch.stack([some[i][0] for i in range(STANDARD)]))
    diffusion.save_vae(folder / "vae", vae)
    error = _reconstruct(folder)
    part = {
        "part": "VAE",
        "steps": steps,
        "batch": batch_size,
        "error": error,
        "seconds": seconds(folder)["vae"],
        "hardware": hardware(),
    }
    weights = {str(WEIGHTS): sha256(folder / WEIGHTS)}
    parts = [*before, part]
    record = {"identity": identity, "parts": parts, "weights_sha256": weights, **made_by()}
    write_json(folder / "run.json", record)
    return folder


def _texts(index: int, seed: int) -> tuple[str, str]:
    s = scene("shapes", "generator", index, seed)
    return s.caption, f"{s.caption}; {' '.join(s.classes)}"


@torch.no_grad()
def _reconstruct(folder: Path) -> float:
    """Mean absolute error on scenes of ``tune``, in grey levels of 255."""
    vae = diffusion.load_vae(folder / "vae").float()
    images = np.stack([scene("shapes", "tune", i).image for i in range(SHOWN)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = [vae.decode(vae.encode(p).latent_dist.mean).sample for p in pixels.split(16)]
    values = (torch.cat(parts).clamp(-1, 1) + 1) * 127.5
    made = values.round().byte().permute(0, 2, 3, 1).numpy()
    rows = [row for k in (0, 8) for row in (list(images[k : k + 8]), list(made[k : k + 8]))]
    sheet = contact_sheet(rows, scale=2)
    write_atomic(folder / "reconstructions.png", encode_image(sheet, ".png"))
    return float(np.abs(made.astype(float) - images).mean())
