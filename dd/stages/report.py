"""Stage: gather finished runs into summary.json and one self-contained page that compares them."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from dd.provenance import read_json, write_json
from dd.report import origins, page, results, studies
from dd.report.compare import comparison
from dd.report.labels import labels_section
from dd.report.published import reproduction
from dd.report.summary import ARMS, collect, separate, summarise
from dd.taxonomy import Taxonomy

SUBTITLE = "Masks read from a text-to-image model's attention, the segmenter trained on them, and what real labels add."


def report(
    folder, runs, tests: dict, synthetic, taxonomy: Taxonomy, domains: list[str], title: str, baseline=None, budgets=()
) -> Path:  # fmt: skip
    """Write ``folder/summary.json`` and ``folder/report.html`` about the finished ``runs`` (folders); returns the page.

    ``tests``: the test images of each domain that is at hand, for the galleries. ``baseline``: the run (folder) that others
    are compared with; None = the first that saw synthetic images only, else the first. ``budgets``: budget.json files to show.
    Results that were edited, come from another version or were measured on other images or classes are kept apart, with the
    reason. ValueError if nothing is left, if the baseline is not among the runs, or for another taxonomy than theirs.
    """
    folder, synthetic = Path(folder), Path(synthetic)
    found, left_out = collect(runs)
    left_out += separate(found, baseline and _given(found, baseline)["name"])
    entries = [e for e in found if e["metrics"]]
    for what, why in left_out:  # on the page too
        Console(stderr=True, soft_wrap=True).print(f"not compared: {what}: {why}", markup=False, highlight=False)
    if not entries:
        reasons = "".join(f"\n  {what}: {why[:300]}" for what, why in left_out[:5])
        raise ValueError(f"report: none of {[str(r) for r in runs][:5]} is a finished run with an evaluation{reasons}")
    _check_classes(entries, domains, taxonomy)
    chosen = _given(entries, baseline) if baseline else _usual(entries)
    main = Counter(e["segmenter"] for e in entries).most_common(1)[0][0]
    alike = [e for e in entries if e["segmenter"] == main]  # curves and class tables are about one segmenter
    summary = summarise(alike, folder, domains, synthetic)
    write_json(folder / "summary.json", summary)
    sections = [
        results.headline(entries, domains),
        labels_section(entries),
        *(section for d in domains for section in reproduction(d, results.measured(entries, d))),
        *(s for path in budgets for s in studies.budget_sections(read_json(path), Path(path).parent.name)),
        *_comparisons(entries, domains, chosen),
        *results.learning_curves(summary, domains),
        *results.class_tables(alike, domains),
        *results.ablation_table(summary, domains),
        *studies.learning_curves(alike, lambda e: ARMS[e["arm"]].format(k=e["shots"])),
        *_looks(entries, domains, tests, taxonomy),
        *results.synthetic_gallery(synthetic, taxonomy),
        *results.real_galleries(alike, tests, taxonomy),
        *studies.sweep_sections(synthetic),
        *origins.left_out_section(left_out),
        *origins.run_sections(entries),
    ]
    facts = {
        "Runs": str(len(entries)),
        "Seeds": ", ".join(map(str, summary["seeds"])),
        "Mask mIoU on noised real test scenes": summary["mask_miou"] and f"{summary['mask_miou']:.1f}",
        "Seconds per stage": ", ".join(f"{k} {v:.0f}" for k, v in summary["seconds"].items() if v),
    }
    print_table(sections[0])
    return page.write(folder / "report.html", page.render(title, SUBTITLE, sections, {k: v for k, v in facts.items() if v}))


def print_table(section: page.Table) -> None:
    """A section of the page on the terminal."""
    table = RichTable(title=section.title)
    for name, cell in zip(section.columns, section.cells()[0], strict=True):
        table.add_column(name, justify="right" if cell["numeric"] else "left")
    for row in section.cells():
        table.add_row(*(cell["text"] for cell in row))
    Console().print(table)


def _given(entries, baseline) -> dict:
    """The entry whose folder is ``baseline``."""
    for entry in entries:
        if entry["folder"].resolve() == Path(baseline).resolve():
            return entry
    names = ", ".join(str(e["folder"]) for e in entries[:8]) + (", ..." if len(entries) > 8 else "")
    raise ValueError(f"baseline={baseline}: none of the evaluated runs, which are {names}")


def _usual(entries) -> dict:
    """The entry that others are compared with unless one is given."""
    return next((e for e in entries if e["arm"] == "synthetic_only" and not e["ablation"]), entries[0])


def _check_classes(entries, domains, taxonomy) -> None:
    for entry in entries:
        for domain in domains:
            names = list(entry["metrics"].get(domain, {}).get("iou", taxonomy.all_names))
            if names != list(taxonomy.all_names):
                raise ValueError(
                    f"{entry['folder']} was evaluated with the classes {names}, and data says {list(taxonomy.all_names)}; "
                    "give the report the data of the runs (data=...)"
                )


def _comparisons(entries, domains, chosen):
    for domain in domains:
        measured = {e["name"]: e["metrics"][domain] for e in entries if domain in e["metrics"]}
        if len(measured) > 1:
            baseline = chosen["name"] if chosen["name"] in measured else next(iter(measured))
            yield comparison(f"Differences on {domain}", measured, baseline)


def _looks(entries, domains, tests, taxonomy):
    """Confusions, best and worst predictions of the best run on each domain."""
    for domain in domains:
        if (best := results.best_run(entries, domain)) is not None:
            yield from results.confusions(best, domain)
            if domain in tests:
                yield from results.extremes(best, domain, tests[domain], taxonomy.all_names)
