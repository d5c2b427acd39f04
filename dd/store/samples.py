"""The plan of a synthetic data set, and the records of what is done.

The plan is frozen before the first image. A *unit* is a fixed group of samples that is always
generated together. A sample's record is appended after its image and heat are in place. To resume
means to make the units that have no complete record.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dd.store.provenance import fault, read_own, sha256
from dd.store.schemas import RECORD, RUN

# comes before the last field of a record: the first digits of the SHA-256 of the text before it
CHECK = ', "sum": "'
DIGITS = 16

PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")  # ids of samples, names of files


class Asked(Protocol):
    """The attributes of a prompt that a plan uses (:class:`dd.prompts.prompt.Prompt`)."""

    @property
    def text(self) -> str: ...
    @property
    def class_prompt(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...


class Classes(Protocol):
    """The attributes of a taxonomy that a plan uses (:class:`dd.taxonomy.Taxonomy`)."""

    def ids(self, names: Iterable[str]) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to make. ``classes`` in prompt order, without repeats; ``class_ids``: their pixel
    values."""

    id: str
    prompt: str
    class_prompt: str
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    seed: int
    unit: int


def sample_seed(run_seed: int, sample_id: str, attempt: int = 0) -> int:
    """First 63 bits of sha256(run seed, sample id[, attempt]): independent of batch, order and
    worker."""
    text = f"{run_seed},{sample_id}" + (f",{attempt}" if attempt else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_plan(
    prompts: Iterable[Asked],
    taxonomy: Classes,
    run_seed: int,
    unit_size: int,
    ends: Collection[int] = (),
) -> list[Sample]:
    """Samples from prompts (objects with ``text``, ``class_prompt``, ``classes``), grouped in units
    of ``unit_size``. ``ends``: numbers of samples of earlier plans, if the set has grown; no unit
    crosses one of these, so that finished units keep their composition."""
    plan: list[Sample] = []
    unit, begin = -1, 0
    for i, p in enumerate(prompts):
        begin = i if i in ends else begin
        unit += (i - begin) % unit_size == 0
        name, ids = f"{i:06d}", tuple(taxonomy.ids(p.classes))
        seed = sample_seed(run_seed, name)
        plan.append(Sample(name, p.text, p.class_prompt, tuple(p.classes), ids, seed, unit))
    return plan


def plan_lines(plan: list[Sample]) -> Iterator[str]:
    """The lines of ``plan.jsonl``, one at a time, since a plan may have a million."""
    for sample in plan:
        row = {key: getattr(sample, key) for key in Sample.__slots__}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def plan_sha256(plan: list[Sample]) -> str:
    """Hash of the frozen plan's file."""
    digest = hashlib.sha256()
    for line in plan_lines(plan):
        digest.update(line.encode())
    return digest.hexdigest()


def read_whole_plan(folder: str | Path) -> list[Sample]:
    """The frozen plan of a data set. FileNotFoundError says how to make one; ValueError names a
    damaged line, or says that the plan does not match run.json (if there is one)."""
    path = Path(folder) / "plan.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} is not a synthetic data set: no plan.jsonl. Make one with generate.py, or "
            "of images of any origin with python -m dd prepare images"
        )
    plan: list[Sample] = []
    same: dict[Any, Any] = {}  # texts and classes repeat: keep one object of each
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            try:
                row = json.loads(line)
                _check_row(row, same)
                for key in ("classes", "class_ids"):
                    row[key] = tuple(row[key])
                row |= {
                    k: same.setdefault(row[k], row[k])
                    for k in ("prompt", "class_prompt", "classes", "class_ids")
                }
                plan.append(Sample(**row))
                if not PLAIN.fullmatch(row["id"]):  # ids become file names
                    raise ValueError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(
                    f"{path}, line {number} is damaged; "
                    "remove the file, and generate.py writes it again"
                ) from None
    run = Path(folder) / "run.json"
    known = read_own(run, RUN)["identity"].get("plan_sha256") if run.is_file() else None
    if known not in (None, digest.hexdigest()):
        raise ValueError(
            f"{path} is not the plan that run.json names: it was damaged or edited; "
            "remove the file, and generate.py writes it again"
        )
    return plan


def _check_row(row: dict[str, Any], known: Collection[Any]) -> None:
    """ValueError or TypeError for a row with other types than :class:`Sample`. ``known``: class
    lists that were checked before."""
    texts = all(type(row[key]) is str for key in ("id", "prompt", "class_prompt"))
    numbers = type(row["seed"]) is int and type(row["unit"]) is int
    names, ids = row["classes"], row["class_ids"]
    if not (texts and numbers and type(names) is list and type(ids) is list):
        raise TypeError
    if tuple(names) in known and tuple(ids) in known:
        return
    plain = all(type(n) is str for n in names) and all(type(i) is int for i in ids)
    if not plain or len(names) != len(ids):
        raise TypeError
    if not all(0 < i < 255 for i in ids):
        raise ValueError


def read_plan(folder: str | Path) -> list[Sample]:
    """The frozen plan of a data set without the samples that failed (:func:`outcomes`): each has,
    or will have, an image.

    FileNotFoundError says how to make one; ValueError if every sample failed.
    """
    return without_failed(read_whole_plan(folder), outcomes(folder), folder)


def without_failed(plan: list[Sample], found: dict[str, str], folder: str | Path) -> list[Sample]:
    """The samples that have, or will have, an image, by :func:`outcomes`. ValueError if there are
    none."""
    left = [s for s in plan if found.get(s.id) not in ("failed", "quarantined")]
    if plan and not left:
        faults = Counter(f for row in _records(folder) for f in row.get("faults", []))
        cure = ". The heat of a high power may be flat: give a smaller diffusion.max_power"
        told = ", ".join(f"{fault} {number} times" for fault, number in faults.most_common())
        raise ValueError(
            f"{folder}: each of its {len(plan)} images stayed bad after all attempts"
            + (f" ({told})" if told else "")
            + "; records/ says more"
            + ("" if "empty mask" not in faults else cure)
        )
    return left


def append_records(folder: str | Path, worker: str, records: list[dict[str, Any]]) -> None:
    """Append records to ``records/<worker>.jsonl`` (:func:`append_lines`), each with its sum."""
    append_lines(Path(folder) / "records" / f"{worker}.jsonl", records, record_line)


def append_lines(
    path: Path,
    records: list[dict[str, Any]],
    line: Callable[[dict[str, Any]], str] = lambda r: json.dumps(r) + "\n",
) -> None:
    """Append JSON lines in one write and sync them; a torn last line is closed first. If a write
    fails (a full disk), it is undone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(map(line, records)).encode()
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), size)
            raise


def record_line(record: dict[str, Any]) -> str:
    """The line of a record: JSON whose last field, ``sum``, shows whether the others are as they
    were written."""
    text = json.dumps(record)[:-1]
    return f'{text}{CHECK}{_sum(text.encode())}"}}\n'


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def each_record(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of one file, in order. A line that was torn by a crash or is damaged is ignored:
    its sample is made again."""
    with open(path, "rb") as file:
        for line in file:
            text, check, rest = line.rpartition(CHECK.encode())
            if check and _sum(text).encode() != rest[:DIGITS]:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if fault(record, RECORD) is None:
                record.pop("sum", None)
                yield record


def _records(folder: str | Path) -> Iterator[dict[str, Any]]:
    for path in sorted((Path(folder) / "records").glob("*.jsonl")):
        yield from each_record(path)


def read_records(folder: str | Path, needs: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The last record of every finished sample, by id; the record of a quarantined unit only if
    there is no other. Records that lack one of the fields ``needs`` do not count."""
    found: dict[str, dict[str, Any]] = {}
    for record in _records(folder):
        if any(key not in record for key in needs):
            continue
        if "error" not in record or "error" in found.get(record["id"], record):
            found[record["id"]] = record
    return found


def intact_masks(folder: Path, needs: tuple[str, ...]) -> set[str]:
    """Ids of the masks in a folder that match its records. ``needs``: fields of the records."""
    files = {i: (folder / f"{i}.png", r["sha256"]) for i, r in read_records(folder, needs).items()}
    return {i for i, (path, written) in files.items() if path.is_file() and sha256(path) == written}


def recorded(folder: str | Path, key: str) -> dict[str, Any]:
    """{id: value of ``key``} of the records of :func:`read_records` that have it, without keeping
    the rest."""
    found = {r["id"]: r.get(key) for r in _records(folder) if "error" not in r}
    return {name: value for name, value in found.items() if value is not None}


def outcomes(folder: str | Path) -> dict[str, str]:
    """The state of each sample by its records, without keeping them: ``good``, ``drawn again``
    (good in the end), ``failed`` (bad after all attempts) or ``quarantined`` (its unit failed with
    an error)."""
    found: dict[str, str] = {}
    for record in _records(folder):
        good = "drawn again" if record.get("faults") else "good"
        if "error" in record:
            found.setdefault(record["id"], "quarantined")
        else:
            found[record["id"]] = "failed" if record.get("failed") else good
    return found


def unfinished(folder: str | Path) -> str | None:
    """A message for a synthetic set whose generation has begun but is not finished; None for any
    other folder."""
    folder = Path(folder)
    if not (folder / "run.json").is_file() or not (folder / "plan.jsonl").is_file():
        return None
    plan, found = read_whole_plan(folder), outcomes(folder)
    made = sum(s.id in found for s in plan)
    if made == len(plan):
        return None
    return (
        f"{folder}: its generation is not finished: {made} of {len(plan)} images are made; "
        "the same generate.py command resumes"
    )


def open_units(plan: Iterable[Sample], records: Collection[str]) -> list[list[Sample]]:
    """The units with samples that are not in ``records``, each whole: the composition of a unit
    never depends on what is already done."""
    units: dict[int, list[Sample]] = {}
    for sample in plan:
        units.setdefault(sample.unit, []).append(sample)
    return [unit for unit in units.values() if any(s.id not in records for s in unit)]
