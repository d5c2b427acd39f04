"""What the runs of a page cost: hours, money, seconds and memory of each stage, and of a label."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dd.evaluation.budget import Prices
from dd.report.html import Cell, Section, Table
from dd.report.recipes import ARMS, Entry
from dd.store.samples import read_records


def cost_section(
    synthetic: Path, entries: Sequence[Entry], prices: Prices, skipped: Mapping[str, Any] | None
) -> Section:
    """Seconds of an image, of a training of each arm and of a label, and what they come to.
    ``skipped``: the labels that synthetic images replace, where that is shown
    (:func:`dd.evaluation.savings.images_skipped`)."""
    rows: list[list[Cell]] = []
    drawn = [r["seconds"] for r in read_records(synthetic, ("seconds",)).values()]
    if drawn:
        rows.append(_computed("a synthetic image", drawn, None, prices))
    for arm, words in ARMS.items():
        runs = [e for e in entries if e["recipe"].arm == arm]
        if runs:
            name = words.format(k="k", chain="another training")
            memory = [e["run"].get("memory_bytes") for e in runs]
            known = [m for m in memory if m]
            seconds = [e["seconds"] for e in runs]
            most = max(known) if known else None
            rows.append(_computed(f"a training: {name}", seconds, most, prices))
    each = prices.minutes_per_image * 60
    rows.append(["a label", 1, each, each / 3600, _label_price(1, prices), None])
    ends = None if skipped is None or not skipped["shown"] else skipped["median"]
    number = ends and (ends["low"] if ends["low"] is not None else ends["high"])
    if number:
        least = "at least " * (ends["high"] is None) if ends else ""
        count = round(number)
        name = f"labels that synthetic images replace ({least}{count})"
        rows.append([name, count, each, count * each / 3600, _label_price(count, prices), None])
    columns = ["what", "how many", "seconds each", "hours in all", "price in all", "peak memory GB"]
    machines = sorted({str(e["run"]["hardware"]) for e in entries if e["run"].get("hardware")})
    where = f" ({'; '.join(machines)})" if machines else ""
    note = (
        f"At {prices.minutes_per_image:g} minutes a label, {prices.per_hour:g} an hour of an "
        f"annotator and {prices.per_gpu_hour:g} an hour of the machine, in any currency "
        "(report.prices=...; the defaults are placeholders). Seconds are of this machine"
        f"{where}; of a training that was interrupted, "
        "those of its last part. Peak memory: of the GPU, or of the process where there is none; a "
        "dash: not recorded. Not counted: training the generator, looks at settings."
    )
    digits = {"hours in all": 2, "price in all": 2}
    return Table("Costs", columns, rows, note, digits=digits)


def _computed(
    name: str, seconds: Sequence[float], memory: int | None, prices: Prices
) -> list[Cell]:
    hours = sum(seconds) / 3600
    price = hours * prices.per_gpu_hour
    return [name, len(seconds), mean(seconds), hours, price, memory and memory / 1e9]


def _label_price(number: int, prices: Prices) -> float:
    return number * prices.minutes_per_image / 60 * prices.per_hour
