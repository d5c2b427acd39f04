"""Stage: is a small set good enough to draw the large one? What its masks and records say, what the
large one would cost, and go or stop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le
from rich.console import Console
from rich.table import Table

from dd.data.datasets import heat_path, synthetic_image
from dd.evaluation.budget import Price
from dd.report.dataset_page import Statistics, statistics
from dd.store.provenance import made_by, read_own, write_json
from dd.store.samples import Sample, read_plan, read_records, unfinished
from dd.store.schemas import DESCRIBED_RUN
from dd.store.settings import Count, Hint, Settings
from dd.taxonomy import IGNORE, Taxonomy

FEW = 5  # images of a class: fewer say nothing of it
Percent = Annotated[float, Ge(0), Le(100)]


class PilotSettings(Settings):
    """``images`` of the set that is planned; ``per_gpu_hour``: price of the machine, in any
    currency. The others are limits, in percent, from which the answer is stop: ``bad``, images with
    an attempt that was bad; ``unseen``, of the images that ask for a class, those whose mask has
    no pixel of it; ``least`` and ``most``, pixels that are of a class; ``uncertain``, pixels that
    are 255. The limits are rules of thumb, fitted to nothing."""

    noun: ClassVar[str] = "pilot"
    images: Annotated[Count, Hint("of the set that is planned")] = 40_000
    per_gpu_hour: Price = 2.0
    bad: Percent = 5.0
    unseen: Percent = 25.0
    least: Percent = 2.0
    most: Percent = 90.0
    uncertain: Percent = 40.0


def pilot(
    folder: str | Path, settings: PilotSettings, mask_set: str = "SegmentationClass"
) -> dict[str, Any]:
    """What a finished small set says of a large one; written to ``pilot.json`` in the set.

    ``seconds`` are those of one device, as the records have them, without loading the model.
    FileNotFoundError without the mask set, ValueError for a set whose generation is not finished.
    """
    folder = Path(folder)
    if why := unfinished(folder):
        raise ValueError(why)
    if not (folder / mask_set / "masks.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no finished mask set {mask_set}; generate.py stage=label makes one"
        )
    plan, records = read_plan(folder), read_records(folder)
    run = read_own(folder / "run.json", {**DESCRIBED_RUN, "sites?": [dict]})
    classes = run["identity"]["taxonomy"]
    names = Taxonomy(classes["name"], classes["names"]).all_names
    found = statistics(plan, folder / mask_set)
    result = {
        "settings": dict(settings),
        "mask_set": mask_set,
        "images": len(plan),
        "bad": sum("faults" in records[s.id] for s in plan),
        "pixels": shares(found, names),
        "classes": {
            name: {"asked": found.asked[name], "missing": found.asked[name] - found.present[name]}
            for name in names[1:]
            if found.asked[name]
        },
        "sites": sites(run.get("sites") or []),
        "cost": cost(folder, plan, records, mask_set, settings),
        **made_by(),
    }
    result["stop"] = reasons(result, settings)
    write_json(folder / "pilot.json", result)
    return result


def shares(found: Statistics, names: Sequence[str]) -> dict[str, float]:
    """Percent of all pixels by class, ``uncertain`` among them."""
    total = max(1, int(found.pixels.sum()))
    values = {name: 100 * int(found.pixels[i]) / total for i, name in enumerate(names)}
    return values | {"uncertain": 100 * int(found.pixels[IGNORE]) / total}


def sites(read: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many layers were read of each kind and side."""
    counted: dict[tuple[str, int], int] = {}
    for site in read:
        key = (str(site["kind"]), int(site["side"]))
        counted[key] = counted.get(key, 0) + 1
    return [{"kind": k, "side": s, "layers": n} for (k, s), n in sorted(counted.items())]


def cost(
    folder: Path,
    plan: list[Sample],
    records: dict[str, dict[str, Any]],
    mask_set: str,
    settings: PilotSettings,
) -> dict[str, float]:
    """``per_second`` images; ``gpu_hours``, ``price`` and ``gigabytes`` of ``settings.images``."""
    seconds = sum(records[s.id].get("seconds", 0.0) for s in plan)
    size = 0
    for s in plan:
        paths = [synthetic_image(folder, s.id), heat_path(folder, s.id)]
        paths.append(folder / mask_set / f"{s.id}.png")
        size += sum(path.stat().st_size for path in paths if path.is_file())
    hours = seconds / len(plan) * settings.images / 3600
    return {
        "per_second": len(plan) / seconds if seconds else 0.0,
        "gpu_hours": hours,
        "price": hours * settings.per_gpu_hour,
        "gigabytes": size / len(plan) * settings.images / 1e9,
    }


def reasons(result: dict[str, Any], settings: PilotSettings) -> list[str]:
    """Why the answer is stop; none where it is go."""
    found, number, pixels = [], result["images"], result["pixels"]
    bad = 100 * result["bad"] / number
    if bad > settings.bad:
        found.append(
            f"{result['bad']} of {number} images had a bad attempt ({bad:.0f} %, at most "
            f"{settings.bad:g} %): records/ says what was wrong"
        )
    for name, counted in result["classes"].items():
        share = 100 * counted["missing"] / counted["asked"]
        if counted["asked"] >= FEW and share > settings.unseen:
            found.append(
                f"{name}: no pixel in {counted['missing']} of the {counted['asked']} images that "
                f"ask for it ({share:.0f} %, at most {settings.unseen:g} %): look at these images "
                "(stage=report), name it otherwise, or lower masks.threshold"
            )
    drawn = 100 - next(iter(pixels.values())) - pixels["uncertain"]
    if not settings.least <= drawn <= settings.most:
        found.append(
            f"{drawn:.1f} % of the pixels are of a class (expected {settings.least:g} to "
            f"{settings.most:g} %): look at masks and heat (stage=report)"
        )
    if pixels["uncertain"] > settings.uncertain:
        found.append(
            f"{pixels['uncertain']:.0f} % of the pixels are uncertain (at most "
            f"{settings.uncertain:g} %): choose a narrower masks.band"
        )
    return found


def print_pilot(result: dict[str, Any]) -> None:
    """The numbers, then the answer."""
    pixels, wanted = result["pixels"], result["settings"]["images"]
    table = Table(title=f"pilot of {result['images']} images, masks of {result['mask_set']}")
    for column in ("class", "asked for", "without a pixel", "share of pixels"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, counted in result["classes"].items():
        few = " (few)" if counted["asked"] < FEW else ""
        row = [name, f"{counted['asked']}{few}", str(counted["missing"]), f"{pixels[name]:.1f} %"]
        table.add_row(*row)
    console = Console()
    console.print(table)
    background = next(iter(pixels))
    read = ", ".join(
        f"{s['layers']} {s['kind']} at {s['side']}x{s['side']}" for s in result["sites"]
    )
    at = result["cost"]
    lines = [
        f"{background} {pixels[background]:.1f} %, uncertain {pixels['uncertain']:.1f} %; "
        f"{result['bad']} images with a bad attempt",
        f"attention read: {read or 'none (images were given)'}",
        f"{at['per_second']:.2f} images/s; {wanted:,} images: {at['gpu_hours']:.1f} GPU-hours, "
        f"price {at['price']:,.0f}, {at['gigabytes']:.1f} GB",
        *(f"stop: {why}" for why in result["stop"]),
    ]
    if not result["stop"]:
        lines.append("go: no limit was passed. What the masks are worth, training alone tells.")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
