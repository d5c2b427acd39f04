"""The plan of a synthetic data set and the record of what is done.

The plan is frozen before the first image; a *unit* is a fixed group of samples that is always generated together; a
sample's record is appended after its image and heat are in place. Resume = the units that have no complete record.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One image to make. ``classes`` in prompt order, without repeats; ``class_ids`` their pixel values."""

    id: str
    prompt: str
    class_prompt: str
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    seed: int
    unit: int


def sample_seed(run_seed: int, sample_id: str, attempt: int = 0) -> int:
    """First 63 bits of sha256(run seed, sample id[, attempt]): independent of batch, order and worker."""
    text = f"{run_seed},{sample_id}" + (f",{attempt}" if attempt else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_plan(prompts, taxonomy, run_seed: int, unit_size: int) -> list[Sample]:
    """Samples from prompts (objects with ``text``, ``class_prompt``, ``classes``), grouped in units of ``unit_size``."""
    return [
        Sample(
            f"{i:06d}", p.text, p.class_prompt, tuple(p.classes), tuple(taxonomy.ids(p.classes)),
            sample_seed(run_seed, f"{i:06d}"), i // unit_size,
        )
        for i, p in enumerate(prompts)
    ]  # fmt: skip


def plan_text(plan: list[Sample]) -> str:
    return "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in plan)


def read_plan(folder: str | Path) -> list[Sample]:
    """The frozen plan of a data set without the samples that failed (:func:`failed`): each has, or will have, an image.

    FileNotFoundError says how to make one; ValueError if every sample failed.
    """
    path = Path(folder) / "plan.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a synthetic data set: no plan.jsonl. Make one with generate.py")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]  # splitlines() knows more ends
    left_out = failed(read_records(folder))
    plan = [
        Sample(**{**r, "classes": tuple(r["classes"]), "class_ids": tuple(r["class_ids"])})
        for r in rows
        if r["id"] not in left_out
    ]
    if rows and not plan:
        raise ValueError(f"{folder}: each of its {len(rows)} images stayed bad, however often drawn; records/ says why")
    return plan


def failed(records: dict[str, dict]) -> set[str]:
    """Ids whose image stayed bad however often it was drawn: their record names no files."""
    return {name for name, record in records.items() if record.get("failed")}


def append_records(folder: str | Path, worker: str, records: list[dict]) -> None:
    """Append lines to ``records/<worker>.jsonl`` in one write and sync it; a torn last line is closed first."""
    path = Path(folder) / "records" / f"{worker}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "ab") as file:
        file.write((b"\n" if torn else b"") + "".join(json.dumps(r) + "\n" for r in records).encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(folder: str | Path) -> dict[str, dict]:
    """The last record of every finished sample, by id; a line torn by a crash is ignored."""
    found = {}
    for path in sorted((Path(folder) / "records").glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                found[record["id"]] = record
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return found


def open_units(plan: list[Sample], records: dict[str, dict]) -> list[list[Sample]]:
    """The units that still have to be generated, each whole: composition never depends on what is done already."""
    units: dict[int, list[Sample]] = {}
    for sample in plan:
        units.setdefault(sample.unit, []).append(sample)
    return [unit for unit in units.values() if any(s.id not in records for s in unit)]
