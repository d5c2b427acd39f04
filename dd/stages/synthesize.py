"""Stage: prompts -> images and heat maps. Costly, resumable; masks are made later, by :mod:`dd.stages.label`."""

import json
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save as safetensors_bytes

from dd.datasets import IMAGE_SUFFIXES, encode_image, write_split
from dd.provenance import made_by, refuse_other, sha256, write_atomic, write_json
from dd.samples import append_records, make_plan, open_units, plan_text, read_records


def synthesize(
    folder, generator, prompts, taxonomy, num_images: int, seed: int, unit_size: int, image_format: str = "jpg"
) -> dict:
    """Make (or go on with) the synthetic data set in ``folder``; returns counts and seconds.

    ``generator`` makes images and heat of a unit (:class:`dd.diffusion.StableDiffusion`), ``prompts(taxonomy, number,
    seed)`` gives the prompts. The plan is written first and never changes; each sample's record is appended after its files
    are in place. FileExistsError if the folder was made with other settings: nothing is touched then.
    """
    folder, suffix = Path(folder), "." + image_format.lstrip(".")
    if num_images < 1 or unit_size < 1:
        raise ValueError(f"num_images and unit_size must be at least 1, got {num_images} and {unit_size}")
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"image_format={image_format!r}; allowed: {', '.join(IMAGE_SUFFIXES)}")
    plan = make_plan(prompts(taxonomy, num_images, seed), taxonomy, seed, unit_size)
    for sample in plan:
        generator.spans(sample)  # a cut-off or missing class word is found here, not in the middle of the run
    identity = {
        "generator": generator.identity(),
        "plan_sha256": sha256(plan_text(plan).encode()),
        "num_images": num_images, "seed": seed, "unit_size": unit_size, "image_format": suffix,
        "taxonomy": {"name": taxonomy.name, "names": list(taxonomy.names)},
    }  # fmt: skip
    refuse_other(folder / "run.json", identity, "data set")
    write_atomic(folder / "plan.jsonl", plan_text(plan))
    if not (folder / "run.json").exists():
        write_json(folder / "run.json", {"identity": identity, **made_by()})

    done = {i: r for i, r in read_records(folder).items() if all(p.is_file() for p in _files(folder, i, suffix))}
    todo, started = open_units(plan, done), time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("generate", total=len(plan), completed=len(plan) - sum(map(len, todo)))
        for unit in todo:
            _make_unit(folder, generator, unit, suffix)
            bar.advance(task, len(unit))
    write_split(folder, "train", [s.id for s in plan])
    return {"images": len(plan), "made_now": sum(map(len, todo)), "seconds": time.perf_counter() - started}


def _files(folder, name, suffix):
    return folder / "JPEGImages" / f"{name}{suffix}", folder / "heat" / f"{name}.safetensors"


def _make_unit(folder, generator, unit, suffix):
    started = time.perf_counter()
    images, heat = generator.generate(unit)
    each, records = (time.perf_counter() - started) / len(unit), []
    for sample, image, maps in zip(unit, images, heat, strict=True):
        description = {"classes": sample.classes, "powers": maps["class_prompt"].shape[1]}
        metadata = {"description": json.dumps(description)}  # one key: safetensors writes several in a random order
        contents = encode_image(image, suffix), safetensors_bytes(maps, metadata)
        files = dict(zip(_files(folder, sample.id, suffix), contents, strict=True))
        for path, data in files.items():
            write_atomic(path, data)
        image_hash, heat_hash = (sha256(data) for data in files.values())
        records.append(
            {"id": sample.id, "unit": sample.unit, "attempt": 0, "image_sha256": image_hash, "heat_sha256": heat_hash,
             "seconds": round(each, 4)}
        )  # fmt: skip
    append_records(folder, "0", records)
