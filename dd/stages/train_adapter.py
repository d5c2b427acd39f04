"""Stage: adapt a Stable Diffusion to unlabelled photographs with LoRA; no mask and no label is
read."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt, MinLen
from pydantic import AfterValidator

from dd import generators as diffusion
from dd.data.datasets import encode_image
from dd.data.photos import Unlabelled
from dd.generators import TextToImage
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
from dd.store.settings import Count, Hint, Settings
from dd.training.adaptation import Adaptation, AdaptationSettings, EachSteps, PhotoData
from dd.training.fitting import fit

LAST = Path("checkpoints") / "last.ckpt"
MOST_CAPTIONS = 10_000  # of one template: all are listed


class Lora(Settings):
    noun: ClassVar[str] = "adapter.lora"
    rank: Count
    alpha: Annotated[float, Gt(0)]
    target_modules: Sequence[str]


class Training(AdaptationSettings):
    """``gradient_checkpointing``: less memory, and more time."""

    learning_rate: Annotated[float, Gt(0)]
    gradient_checkpointing: bool = False


class Samples(Settings):
    """Sample sheets: a row for each of ``prompts``, ``seeds`` columns, every ``every`` steps."""

    noun: ClassVar[str] = "adapter.samples"
    prompts: Annotated[Sequence[str], MinLen(1), Hint("at least one prompt, to look at")]
    every: Count
    seeds: Count


def _sound(model: type[Settings]) -> AfterValidator:
    """The values as they were written, which the identity of a run holds, after ``model`` accepted
    them."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        model(**values)
        return values

    return AfterValidator(check)


class AdapterSettings(Settings):
    """``images``: the folder of photographs; ``listed``: a file with one image (stem or name) a
    line, None for all. ``captions``: a file of {"filename", "caption"}, or None for ``template``
    with each combination of ``conditions`` {name: phrases}. ``lora``: :class:`Lora`, ``training``:
    :class:`Training`, ``samples``: :class:`Samples`."""

    noun: ClassVar[str] = "adapter"
    images: str | Path
    listed: str | Path | None
    captions: str | Path | None
    template: str
    conditions: dict[str, Any]
    lora: Annotated[dict[str, Any], _sound(Lora)]
    training: Annotated[dict[str, Any], _sound(Training)]
    max_steps: Count
    batch_size: Count
    samples: Annotated[dict[str, Any], _sound(Samples)]


def train_adapter(
    folder: str | Path,
    generator: TextToImage,
    trainer: Callable[..., Any],
    settings: AdapterSettings,
    num_workers: int = 0,
    seed: int = 0,
    trained_with: dict[str, Any] | None = None,
) -> Path:
    """Train LoRA layers of ``generator`` on unlabelled photographs; returns the adapter's file in
    ``folder``.

    ``trainer(max_steps, default_root_dir, average)`` makes a Lightning trainer; ``trained_with``
    are those of its settings that decide weights. An interrupted training resumes from its last
    checkpoint, a finished one is left alone, a folder made with other settings is refused.
    ``run.json`` is written last.

    Photographs that cannot be decoded are left out, with their captions and a warning.
    """
    folder, captions, training = Path(folder), settings.captions, settings.training
    photos = Unlabelled(settings.images, settings.listed, "adapter")
    files = photos.files
    if captions:
        texts = captions_of(files, settings.images, captions)
    else:
        texts = [fill(settings.template, settings.conditions)] * len(files)
    _check_length(generator, texts)
    lora = {**settings.lora, "target_modules": sorted(settings.lora["target_modules"])}
    identity = {
        "base_sha256": generator.checkpoint.sha256(),
        "lora": lora,
        "training": training,
        "max_steps": settings.max_steps,
        "batch_size": settings.batch_size,
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
    # with their captions, which do not describe another photograph
    sound = photos.sound()
    photos.files, texts = [files[i] for i in sound], [texts[i] for i in sound]
    checkpointing = training.get("gradient_checkpointing", False)
    model = diffusion.Trainable(generator, seed, checkpointing, **lora)
    how = {k: v for k, v in training.items() if k != "gradient_checkpointing"}
    module = Adaptation(model, seed=seed, **how)
    write_json(folder / SETTINGS, {"identity": identity})
    data = PhotoData(photos, texts, generator.size, settings.batch_size, num_workers, seed)
    made, shown = trainer(settings.max_steps, folder, False), settings.samples
    made.callbacks += [EachSteps(partial(_draw, folder, generator, shown), shown["every"])]
    _fit(folder, made, module, data)
    # a finished training that was only opened again has untrained layers
    module.load_state_dict(checkpoints.load(folder / LAST)["state_dict"])
    model.save(target)
    record = {
        "adapter_sha256": sha256(target),
        "base": generator.settings.model,
        "images": str(settings.images),
        "captions": captions,
        "template": None if captions else settings.template,
        "supervision": {"labels": 0, "masks_read": False},
        "left_out": len(files) - len(sound),
        "parameters": sum(p.numel() for p in model.parameters),
        "seconds": read_own(folder / "seconds.json", SECONDS)["seconds"],
    }
    write_json(folder / "run.json", {"identity": identity, **record, **made_by()})
    return target


def captions_of(files: list[Path], folder: str | Path, path: str | Path) -> list[list[str]]:
    """The captions of a caption file for each image, matched by its path below ``folder``, else by
    its stem if no other image has the same; ValueError for images without one."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"adapter.captions={path}: no such file; generate.py stage=caption makes one"
        )
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        if name := row.get("filename") or row.get("id"):
            for key in {str(PurePosixPath(name)), stem(name)}:
                found.setdefault(key, []).append(row["caption"])
    # cameras may number alike, so one's caption must not be given to the other's image
    same = Counter(stem(f.name) for f in files)
    alone = [found.get(stem(f.name)) if same[stem(f.name)] == 1 else None for f in files]
    texts = [
        found.get(f.relative_to(folder).as_posix()) or each or []
        for f, each in zip(files, alone, strict=True)
    ]
    lacking = [
        f.relative_to(folder).as_posix() for f, each in zip(files, texts, strict=True) if not each
    ]
    if lacking:
        raise ValueError(
            f"adapter.captions={path} has no caption for {len(lacking)} of {len(files)} images, "
            f"such as {lacking[:3]}: caption them, or leave them out with adapter.list"
        )
    return texts


def fill(template: str, conditions: dict[str, list[str]]) -> list[str]:
    """The template with each combination of the conditions' phrases; ValueError for a name without
    phrases or a condition that the template does not use."""
    unused = [name for name in conditions if f"{{{name}}}" not in template]
    lists = all(isinstance(words, list | tuple) and words for words in conditions.values())
    if unused or not lists:
        raise ValueError(
            f"adapter.conditions={conditions}: a list of phrases for each {{name}} in {template!r}"
        )
    filled = []
    for words in itertools.islice(itertools.product(*conditions.values()), MOST_CAPTIONS + 1):
        try:
            filled.append(template.format_map(dict(zip(conditions, words, strict=True))))
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"adapter.template={template!r}: {error} is not a condition; conditions: "
                f"{', '.join(conditions) or 'none'}"
            ) from None
    if len(filled) > MOST_CAPTIONS:
        raise ValueError(
            f"adapter.conditions have more than {MOST_CAPTIONS} combinations; give fewer phrases"
        )
    return filled


def _check_length(generator: TextToImage, texts: list[list[str]]) -> None:
    """ValueError for a caption that the text encoder would cut off."""
    different = sorted({text for each in texts for text in each})
    long = [text for text in different if generator.token_count(text) > generator.token_limit]
    if long:
        raise ValueError(
            f"{len(long)} captions are longer than the text encoder's {generator.token_limit} "
            f"tokens, such as {long[0]!r}; shorten them (generate.py stage=caption "
            "captioner.max_new_tokens=...)"
        )


def _fit(folder: Path, trainer: Any, module: Any, data: Any) -> None:
    """Train, and count the seconds of interrupted trainings too."""
    file = folder / "seconds.json"
    before = read_own(file, SECONDS)["seconds"] if file.exists() else 0
    started = time.perf_counter()
    try:
        fit(trainer, module, data, folder / LAST)
    finally:
        write_json(file, {"seconds": before + time.perf_counter() - started})


@torch.no_grad()
def _draw(folder: Path, generator: TextToImage, samples: dict[str, Any], step: int) -> None:
    """Write ``samples/step_<n>.png``: a row for each prompt, a column for each seed, the same noise
    at every step."""
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
