"""Stage: prompts -> images and heat maps. Costly, resumable; masks are made later, by :mod:`dd.stages.label`."""

import json
import time
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save as safetensors_bytes

from dd.datasets import IMAGE_SUFFIXES, encode_image, write_split
from dd.prompt_check import check_spans, print_summary, summarise, within_limit
from dd.provenance import made_by, refuse_other, sha256, write_atomic, write_json
from dd.samples import append_records, failed, make_plan, open_units, plan_text, read_plan, read_records, sample_seed


def synthesize(
    folder,
    generator,
    prompts,
    taxonomy,
    num_images: int | None,
    seed: int,
    unit_size: int,
    image_format: str = "jpg",
    prompts_over_limit: str = "refuse",
    redraw: int = 3,
) -> dict:
    """Make (or go on with) the synthetic data set in ``folder``; returns counts and seconds.

    ``generator`` makes images and heat of a unit (:class:`dd.diffusion.StableDiffusion`), ``prompts(taxonomy, number,
    seed)`` gives the prompts (``num_images`` None: all that the source has); ``prompts_over_limit``: what happens to those
    longer than the text encoder reads (:func:`dd.prompt_check.within_limit`); ``redraw``: how often a bad image (blacked out,
    not finite, constant) is drawn again before its sample is left out of the split and of every mask set. The plan is written
    first and never changes; each sample's record is appended after its files are in place. FileExistsError if the folder was
    made with other settings: nothing is touched then. ValueError if no image is good.
    """
    folder, suffix = Path(folder), "." + image_format.lstrip(".")
    if (num_images is not None and num_images < 1) or unit_size < 1:
        raise ValueError(f"num_images and unit_size must be at least 1, got {num_images} and {unit_size}")
    if redraw < 0:
        raise ValueError(f"redraw={redraw}: the number of further attempts must be 0 or more")
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"image_format={image_format!r}; allowed: {', '.join(IMAGE_SUFFIXES)}")
    wanted = within_limit(prompts(taxonomy, num_images, seed), generator, prompts_over_limit)
    plan = make_plan(wanted, taxonomy, seed, unit_size)
    check_spans(plan, generator)  # a missing class word is found here, not in the middle of the run
    identity = {
        "generator": generator.identity(),
        "plan_sha256": sha256(plan_text(plan).encode()),
        "num_images": len(plan), "seed": seed, "unit_size": unit_size, "image_format": suffix,
        "taxonomy": {"name": taxonomy.name, "names": list(taxonomy.names)},
    }  # fmt: skip
    identity |= {} if redraw == 3 else {"redraw": redraw}  # sets made before it was a setting can be gone on with
    refuse_other(folder / "run.json", identity, "data set")
    print_summary(summarise(wanted, taxonomy, generator))
    write_atomic(folder / "plan.jsonl", plan_text(plan))
    if wanted.dropped:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in wanted.dropped)
        write_atomic(folder / "dropped_captions.jsonl", "".join(lines))
    if not (folder / "run.json").exists():
        write_json(folder / "run.json", {"identity": identity, "terms": generator.terms, **made_by()})

    done = {
        i for i, r in read_records(folder).items() if r.get("failed") or all(p.is_file() for p in _files(folder, i, suffix))
    }
    todo, started = open_units(plan, done), time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("generate", total=len(plan), completed=len(plan) - sum(map(len, todo)))
        for unit in todo:
            _make_unit(folder, generator, unit, suffix, seed, redraw)
            bar.advance(task, len(unit))
    good, records = read_plan(folder), read_records(folder)
    write_split(folder, "train", [s.id for s in good])
    return {
        "images": len(good), "made_now": sum(map(len, todo)), "seconds": time.perf_counter() - started,
        "drawn_again": sum(bool(records[s.id].get("faults")) for s in good), "failed": len(failed(records)),
    }  # fmt: skip


def _files(folder, name, suffix):
    return folder / "JPEGImages" / f"{name}{suffix}", folder / "heat" / f"{name}.safetensors"


def _draw(generator, unit, seed, redraw):
    """(sample, image, heat, faults of its bad attempts) of a unit; the image is None if every attempt was bad. Another attempt
    is drawn alone, with the attempt's own seed: it depends on nothing but the sample."""
    images, heat, faults = generator.generate(unit)
    for sample, image, maps, fault in zip(unit, images, heat, faults, strict=True):
        seen = []
        while fault is not None:
            seen.append(fault)
            if len(seen) > redraw:
                image = None
                break
            again = replace(sample, seed=sample_seed(seed, sample.id, attempt=len(seen)))
            (image,), (maps,), (fault,) = generator.generate([again])
        yield sample, image, maps, seen


def _make_unit(folder, generator, unit, suffix, seed, redraw):
    started = time.perf_counter()
    drawn, records = list(_draw(generator, unit, seed, redraw)), []
    each = round((time.perf_counter() - started) / len(unit), 4)
    for sample, image, maps, faults in drawn:
        record = {"id": sample.id, "unit": sample.unit, "attempt": min(len(faults), redraw)}
        record |= {"faults": faults} if faults else {}
        if image is None:
            records.append({**record, "failed": True, "seconds": each})
            continue
        description = {"classes": sample.classes, "powers": maps["class_prompt"].shape[1]}
        metadata = {"description": json.dumps(description)}  # one key: safetensors writes several in a random order
        contents = encode_image(image, suffix), safetensors_bytes(maps, metadata)
        files = dict(zip(_files(folder, sample.id, suffix), contents, strict=True))
        for path, data in files.items():
            write_atomic(path, data)
        image_hash, heat_hash = (sha256(data) for data in files.values())
        records.append({**record, "image_sha256": image_hash, "heat_sha256": heat_hash, "seconds": each})
    append_records(folder, "0", records)
