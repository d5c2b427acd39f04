"""Stage: one self-contained page about one synthetic data set."""

from pathlib import Path

from dd.report import dataset_page as dataset
from dd.report import html as page
from dd.report import origins, studies
from dd.store.provenance import read_own
from dd.store.samples import read_plan, read_records, unfinished
from dd.store.schemas import DESCRIBED_RUN, MASKS
from dd.taxonomy import Taxonomy

LIMIT = 20_000_000  # bytes of a page


def report_dataset(
    folder: str | Path, mask_set: str = "SegmentationClass", gallery: int = 60
) -> Path:
    """Write ``report.html`` (``report_<mask set>.html`` for a further mask set) into the synthetic
    set ``folder``: class balance, areas, uncertainty, quality signals, ``gallery`` samples to
    filter and search, how it was made. Returns the page.

    FileNotFoundError if it is no synthetic set or has no such finished mask set; ValueError for a
    set whose generation is not finished.
    """
    folder = Path(folder)
    if why := unfinished(folder):
        raise ValueError(why)
    plan, masks = read_plan(folder), folder / mask_set
    if not (masks / "masks.json").is_file():
        there = sorted(str(p.parent.relative_to(folder)) for p in folder.glob("**/masks.json"))
        raise FileNotFoundError(
            f"{folder} has no finished mask set {mask_set}; there: "
            f"{', '.join(there) or 'none, make one with stage=label'}"
        )
    run, records = read_own(folder / "run.json", DESCRIBED_RUN), read_records(folder)
    made = read_own(masks / "masks.json", MASKS)
    names = Taxonomy(
        run["identity"]["taxonomy"]["name"], run["identity"]["taxonomy"]["names"]
    ).all_names
    settings = made["identity"].get("settings", {})
    power, source = settings.get("power"), settings.get("source", "class_prompt")
    found = dataset.statistics(plan, masks)
    signals = [records[s.id]["signals"] for s in plan if "signals" in records.get(s.id, {})]
    reading = made["identity"].get("reading")
    if reading is not None:  # theirs are of the drawing's heat
        signals = [{k: v for k, v in each.items() if k != "heat"} for each in signals]
    generator = run["identity"]["generator"]
    head = [*dataset.balance(found, names), *dataset.histograms(found, signals, power, source)]
    tail = [*studies.sweep_sections(folder), *origins.made_section(run, made)]
    seconds = sum(r["seconds"] for r in records.values() if "seconds" in r)
    facts = {
        "Images": f"{len(plan):,}",
        "Classes": str(len(names) - 1),
        "Masks": mask_set,
        "Generator": str(generator.get("model") or f"images given: {run.get('source')}"),
        "Seconds to generate": f"{seconds:,.0f}",
        "Images that lack a class": f"{len(found.missing):,}",
        "Licence": str((run.get("terms") or {}).get("licence") or "not stated"),
    }
    name = "report" if mask_set == "SegmentationClass" else f"report_{Path(mask_set).name}"
    while True:  # pictures are what makes a page large
        shown = dataset.gallery(
            folder, masks, dataset.choose(plan, gallery), found, names, power, source, reading
        )
        html = page.render(
            f"Synthetic data: {folder.name}",
            "Images without a human label.",
            [*head, shown, *tail],
            facts,
        )
        if len(html.encode()) < LIMIT or gallery == 1:
            return page.write(folder / f"{name}.html", html)
        gallery //= 2
