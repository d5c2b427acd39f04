"""Stage: images of any origin (of a closed model, photographs) with captions -> a synthetic set
without heat, with a plan and records. generate.py stage=read then reads it."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from dd.data.datasets import encode_image, opened, squared, write_split
from dd.data.folders import IMAGES, Files, index, one_form
from dd.data.photos import check_readable, read_photo
from dd.prompts.captions import Caption, keep, nouns_alone, read_rows, row_classes, stem
from dd.prompts.nouns import ClassNouns
from dd.prompts.prompt import make_prompt
from dd.store.locks import Lock
from dd.store.names import folder_name
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, made_by, refuse_other, sha256, write_atomic, write_json
from dd.store.samples import (
    Sample,
    append_records,
    make_plan,
    plan_lines,
    plan_sha256,
    read_records,
)
from dd.taxonomy import Taxonomy, taxonomy

SUFFIX = ".png"


@dataclass(frozen=True)
class GivenImages:
    """``images``: a folder, never written to; ``captions``: a JSON list or JSON lines of
    {"filename", "caption"}; without "classes" they are found among the caption's nouns. ``fit``:
    how images that are not square, or not of one size, become ``size`` pixels a side: "crop" (the
    middle) or "squash"; None refuses them."""

    images: str | Path
    captions: str | Path
    fit: Literal["crop", "squash"] | None = None
    size: int | None = None


def prepare_images(
    data_root: str | Path, taxonomy_file: str | Path, name: str, given: GivenImages, seed: int = 0
) -> tuple[Path, list[str]]:
    """(``data_root/synthetic/<name>``, notes). Images are stored as PNG. run.json comes first,
    records as they are written, and the list train.txt last, so an interrupted run resumes.

    ValueError or FileNotFoundError for captions without an image or a class of the taxonomy, and
    for images that are not square or of several sizes without ``fit``; FileExistsError for a folder
    that was made from other images.
    """
    if (given.fit is None) != (given.size is None) or (given.size is not None and given.size < 8):
        raise ValueError(
            f"--fit {given.fit}, --size {given.size}: give both, as --fit crop --size 512, or none"
        )
    classes = taxonomy(taxonomy_file)
    root = Path(data_root) / "synthetic" / folder_name(name, "name")
    files = index(given.images, IMAGES)
    if not Path(given.captions).is_file():
        raise FileNotFoundError(f"--captions {given.captions}: no such file")
    captions, dropped = _captions(Path(given.captions), files, classes)
    paths = [files[str(caption.filename)] for caption in captions]
    side = given.size or _one_size(paths)
    plan = make_plan(
        [make_prompt(c.text, c.classes, append=False) for c in captions], classes, seed, 1
    )
    identity = {
        "generator": {
            "given": fingerprint([sha256(path) for path in paths]),
            "fit": given.fit,
            "size": side,
        },
        "plan_sha256": plan_sha256(plan),
        "num_images": len(plan),
        "seed": seed,
        "unit_size": 1,
        "image_format": SUFFIX,
        "taxonomy": {"name": classes.name, "names": list(classes.names)},
    }
    refuse_other(root / "run.json", identity, "data set", "--name")
    if not (root / "run.json").exists():  # else they were decoded before
        check_readable(paths, "--captions")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{root} is a file, or lies below one; choose another --name") from None
    with Lock(root):
        refuse_other(root / "run.json", identity, "data set", "--name")
        write_atomic(root / "plan.jsonl", plan_lines(plan))
        if dropped:
            rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in dropped)
            write_atomic(root / "dropped_captions.jsonl", rows)
        if not (root / "run.json").exists():
            known = {"terms": None, "source": str(Path(given.images).resolve())}
            write_json(root / "run.json", {"identity": identity, **known, **made_by()})
        _write(root, plan, paths, side, given.fit)
        write_split(root, "train", [s.id for s in plan])
    reasons = Counter(row["reason"] for row in dropped)
    notes = files.notes + [f"{n} captions are left out: {why}" for why, n in reasons.items()]
    return root, notes


def _captions(
    path: Path, files: Files, classes: Taxonomy
) -> tuple[list[Caption], list[dict[str, str | None]]]:
    """(captions with a class, each with the key of its image among ``files``; the others)."""
    nouns, found, forms = ClassNouns(classes), [], {one_form(key): key for key in files}
    stems: dict[str, list[str]] = defaultdict(list)
    for form, key in forms.items():
        stems[PurePosixPath(form).name].append(key)
    for i, row in enumerate(read_rows(path)):
        try:
            listed = row.keys() & {"classes", "class_prompt"}
            text = row["caption"] if listed else nouns_alone(row)
            own = row_classes(row, classes) if listed else tuple(nouns.mentions(text))
            key = _image(row.get("filename") or row.get("id"), forms, stems)
        except ValueError as error:
            raise ValueError(f"{path}, entry {i}: {error}") from None
        found.append(Caption(text, own, key))
    several = [key for key, n in Counter(c.filename for c in found).items() if n > 1]
    if several:
        raise ValueError(
            f"{path} has several captions of {len(several)} images, such as {several[0]}: an image "
            "has the classes of one; leave the others out"
        )
    return keep(found, None, None)


def _image(filename: object, forms: dict[str, str], stems: Mapping[str, list[str]]) -> str:
    """The key of an image by its path below the folder, else by its stem if that is unique.
    ``forms``: the keys in the form used for comparing names."""
    if not isinstance(filename, str):
        raise ValueError("need 'filename', the image of the caption")
    name = stem(filename)
    written = PurePosixPath(one_form(filename.strip().replace("\\", "/")))
    below = (written.parent / name).as_posix()
    if name and below in forms:
        return forms[below]
    matches = stems.get(name, [])
    if len(matches) != 1:
        what = "several images have that stem" if matches else "no such image"
        raise ValueError(f"{filename}: {what} in the folder")
    return matches[0]


def _one_size(paths: Sequence[Path]) -> int:
    """The common side of all images."""
    sizes: dict[tuple[int, int], Path] = {}
    for path in paths:
        with opened(path, header=True) as image:
            sizes.setdefault(image.size, path)
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        shown = ", ".join(f"{w}x{h} ({p.name})" for (w, h), p in list(sizes.items())[:3])
        raise ValueError(
            f"the images are not square or not of one size: {shown}. A model reads squares: "
            "--fit crop --size 512 takes the middle of each, --fit squash --size 512 changes their "
            "shape"
        )
    return next(iter(sizes))[0]


def _write(root: Path, plan: list[Sample], paths: list[Path], side: int, fit: str | None) -> None:
    records = read_records(root, ("image_sha256",))
    todo = [
        (sample, path)
        for sample, path in zip(plan, paths, strict=True)
        if sample.id not in records or not (root / "JPEGImages" / f"{sample.id}{SUFFIX}").is_file()
    ]
    with Progress("images", len(plan), len(plan) - len(todo)) as progress:
        for sample, path in todo:
            content = encode_image(squared(read_photo(path), side, fit == "crop"), SUFFIX)
            write_atomic(root / "JPEGImages" / f"{sample.id}{SUFFIX}", content)
            row = {"id": sample.id, "unit": sample.unit, "file": str(path)}
            append_records(root, "0", [{**row, "image_sha256": sha256(content)}])
            progress.advance()
