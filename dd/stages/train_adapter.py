"""Stage: adapt a Stable Diffusion to unlabelled photographs with LoRA; no mask and no label is
read."""

import itertools
import time
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dd import generators as diffusion
from dd.data.datasets import encode_image
from dd.data.photos import Unlabelled
from dd.generators import StableDiffusion
from dd.prompts.captions import read_rows, stem
from dd.report.pictures import contact_sheet
from dd.store import checkpoints
from dd.store.provenance import (
    SETTINGS,
    fingerprint,
    finished_run,
    made_by,
    read_own,
    sha256,
    write_atomic,
    write_json,
)
from dd.store.samples import Sample, sample_seed
from dd.store.schemas import SECONDS
from dd.training.adaptation import Adaptation, EachSteps, PhotoData
from dd.training.fitting import fit

LAST = Path("checkpoints") / "last.ckpt"
MOST_CAPTIONS = 10_000  # of one template: all are listed


def train_adapter(
    folder: str | Path,
    generator: StableDiffusion,
    trainer: Trainers,
    images: str | Path,
    listed: str | Path | None,
    captions: str | Path | None,
    template: str,
    conditions: dict[str, Any],
    lora: dict[str, Any],
    training: dict[str, Any],
    max_steps: int,
    batch_size: int,
    samples: dict[str, Any],
    num_workers: int = 0,
    seed: int = 0,
    trained_with: dict[str, Any] | None = None,
) -> Path:
    """Train LoRA layers of ``generator`` (:class:`dd.generators.StableDiffusion`) on the
    photographs below the folder ``images``; returns the adapter's file in ``folder``.

    ``listed``: a file with one image (stem or name) a line, None for all. ``captions``: a file of
    {"filename", "caption"}, or None for ``template`` with each combination of ``conditions`` {name:
    phrases}. ``lora``: rank, alpha, target_modules; ``training``: settings of
    :class:`dd.training.adaptation.Adaptation`; ``samples``: prompts, every, seeds of the sample
    sheets. ``trainer(max_steps, default_root_dir, average)`` makes a Lightning trainer,
    ``trained_with`` are those of its settings that decide weights. An interrupted training goes on
    from its last checkpoint, a finished one is left alone, a folder made with other settings is
    refused. ``run.json`` is written last.

    Photographs that cannot be decoded are left out, with a warning and with their captions.
    """
    folder = Path(folder)
    _check(lora, training, samples, max_steps, batch_size)
    photos = Unlabelled(images, listed, "adaptation")
    files = photos.files
    texts = (
        captions_of(files, images, captions)
        if captions
        else [fill(template, conditions)] * len(files)
    )
    _check_length(generator, texts)
    identity = {
        "base_sha256": generator.checkpoint.sha256(),
        "lora": {**lora, "target_modules": sorted(lora["target_modules"])},
        "training": training,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "size": generator.size,
        "seed": seed,
        "images": {"number": len(files), "sha256": fingerprint([sha256(f) for f in files])},
        "captions_sha256": fingerprint(texts),
        "captions_from": "file" if captions else "template",
        "trainer": trained_with,
    }
    target = folder / diffusion.WEIGHTS
    if finished_run(folder, identity) is not None:
        return target
    sound = (
        photos.sound()
    )  # with their captions: another photograph in place of one would have its words
    photos.files, texts = [files[i] for i in sound], [texts[i] for i in sound]
    checkpointing = training.get("gradient_checkpointing", False)
    parameters = diffusion.add_lora(
        generator.pipe, **identity["lora"], seed=seed, checkpointing=checkpointing
    )
    settings = {k: v for k, v in training.items() if k != "gradient_checkpointing"}
    scheduler = diffusion.noise_schedule(generator.pipe)
    module = Adaptation(
        generator.pipe,
        parameters,
        lambda t: generator.encode(t)[0],
        scheduler,
        seed=seed,
        **settings,
    )
    write_json(folder / SETTINGS, {"identity": identity})
    data = PhotoData(photos, texts, generator.size, batch_size, num_workers, seed)
    made = trainer(max_steps=max_steps, default_root_dir=folder, average=False)
    made.callbacks += [
        EachSteps(lambda step: _draw(folder, generator, samples, step), samples["every"])
    ]
    _fit(folder, made, module, data)
    # a finished training that was only opened again has fresh layers
    module.load_state_dict(checkpoints.load(folder / LAST)["state_dict"])
    diffusion.save_adapter(target, generator.pipe)
    record = {
        "adapter_sha256": sha256(target),
        "base": generator.settings.model,
        "images": str(images),
        "captions": captions,
        "template": None if captions else template,
        "supervision": {"labels": 0, "masks_read": False},
        "left_out": len(files) - len(sound),
        "parameters": sum(p.numel() for p in parameters),
        "seconds": read_own(folder / "seconds.json", SECONDS)["seconds"],
    }
    write_json(folder / "run.json", {"identity": identity, **record, **made_by()})
    return target


def _check(
    lora: dict[str, Any],
    training: dict[str, Any],
    samples: dict[str, Any],
    max_steps: int,
    batch_size: int,
) -> None:
    """ValueError for a setting out of range, before any work."""
    whole = {
        "lora.rank": lora["rank"],
        "max_steps": max_steps,
        "batch_size": batch_size,
        "samples.every": samples["every"],
    }
    for name, value in (whole | {"samples.seeds": samples["seeds"]}).items():
        if type(value) is not int or value < 1:
            raise ValueError(f"adapter.{name}={value!r}: expected a whole number of 1 or more")
    gamma = training["min_snr_gamma"]
    rates = {
        "lora.alpha": lora["alpha"],
        "training.learning_rate": training["learning_rate"],
        "training.min_snr_gamma": gamma,
    }
    for name, value in rates.items():
        if not (value is None and name == "training.min_snr_gamma") and not value > 0:
            raise ValueError(f"adapter.{name}={value!r}: expected a number above 0")
    if not 0 <= training["caption_dropout"] <= 1:
        raise ValueError(
            f"adapter.training.caption_dropout={training['caption_dropout']}: expected a share "
            "from 0 to 1"
        )
    if not samples["prompts"]:
        raise ValueError("adapter.samples.prompts: at least one prompt is needed, to look at")


def captions_of(files: list[Path], folder: str | Path, path: str | Path) -> list[list[str]]:
    """The captions that a caption file has for each image, by its path below ``folder``, else by
    its stem where no other image has the same; ValueError for images without one."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"adapter.captions={path}: no such file; generate.py stage=caption makes one"
        )
    found = {}
    for row in read_rows(path):
        if name := row.get("filename") or row.get("id"):
            for key in {str(PurePosixPath(name)), stem(name)}:
                found.setdefault(key, []).append(row["caption"])
    same = Counter(
        stem(f.name) for f in files
    )  # cameras that number alike: one's caption is not the other's
    alone = [found.get(stem(f.name)) if same[stem(f.name)] == 1 else None for f in files]
    texts = [
        found.get(f.relative_to(folder).as_posix()) or each or []
        for f, each in zip(files, alone, strict=True)
    ]
    if lacking := [
        f.relative_to(folder).as_posix() for f, each in zip(files, texts, strict=True) if not each
    ]:
        raise ValueError(
            f"adapter.captions={path} has no caption for {len(lacking)} of {len(files)} "
            f"images, such as {lacking[:3]}: "
            "caption them, or leave them out with adapter.list"
        )
    return texts


def fill(template: str, conditions: dict[str, list[str]]) -> list[str]:
    """The template with each combination of the conditions' phrases; ValueError for a name
    without phrases or a condition that the template does not hold."""
    unused = [name for name in conditions if f"{{{name}}}" not in template]
    if unused or any(
        not isinstance(words, list | tuple) or not words for words in conditions.values()
    ):
        raise ValueError(
            f"adapter.conditions={conditions}: a list of phrases for each {{name}} in {template!r}"
        )
    filled = []
    for words in itertools.islice(itertools.product(*conditions.values()), MOST_CAPTIONS + 1):
        try:
            filled.append(template.format_map(dict(zip(conditions, words, strict=True))))
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"adapter.template={template!r}: {error} is no condition; conditions: "
                f"{', '.join(conditions) or 'none'}"
            ) from None
    if len(filled) > MOST_CAPTIONS:
        raise ValueError(
            f"adapter.conditions have more than {MOST_CAPTIONS} combinations; give fewer phrases"
        )
    return filled


def _check_length(generator: StableDiffusion, texts: list[list[str]]) -> None:
    """ValueError for a caption that the text encoder would cut off."""
    different = {text for each in texts for text in each}
    long = [
        text for text in sorted(different) if generator.token_count(text) > generator.token_limit
    ]
    if long:
        raise ValueError(
            f"{len(long)} captions are longer than the text encoder's {generator.token_limit} "
            f"tokens, such as {long[0]!r}; "
            "shorten them (generate.py stage=caption captioner.max_new_tokens=...)"
        )


def _fit(folder: Path, trainer: Trainers, module: Any, data: Any) -> None:
    """Train, and count the seconds of an interrupted training too."""
    before = (
        read_own(folder / "seconds.json", SECONDS)["seconds"]
        if (folder / "seconds.json").exists()
        else 0
    )
    started = time.perf_counter()
    try:
        fit(trainer, module, data, folder / LAST)
    finally:
        write_json(folder / "seconds.json", {"seconds": before + time.perf_counter() - started})


@torch.no_grad()
def _draw(folder: Path, generator: StableDiffusion, samples: dict[str, Any], step: int) -> None:
    """``samples/step_<n>.png``: a row for each prompt, a column for each seed, the same noise at
    every step."""
    generator.device = str(generator.pipe.device)
    rows = []
    for prompt in samples["prompts"]:
        plan = [
            Sample(str(i), prompt, "", (), (), sample_seed(0, str(i)), 0)
            for i in range(samples["seeds"])
        ]
        rows.append(list(generator.generate(plan, capture=False)[0]))
    scale = max(1, 128 // generator.size)
    sheet = contact_sheet(rows, scale, row_labels=[p or "(no words)" for p in samples["prompts"]])
    write_atomic(folder / "samples" / f"step_{step:06d}.png", encode_image(sheet, ".png"))
