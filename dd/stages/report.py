"""Stage: gather finished runs into summary.json and one self-contained page that compares them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from dd.data.datasets import SegmentationFolder
from dd.data.groups import recorded_groups
from dd.evaluation.budget import Prices
from dd.report import html as page
from dd.report import origins, studies
from dd.report import runs_page as results
from dd.report.compare import comparison
from dd.report.costs import cost_section
from dd.report.html import Section
from dd.report.labels import labels_section
from dd.report.published import reproduction
from dd.report.recipes import Entry
from dd.report.rows import Row, arrange, without_short_controls
from dd.report.summary import LeftOut, collect, images_of, separate, summarise
from dd.report.verdict import acceptance_sections, as_plain, verdict_section, verdicts
from dd.report.whose_masks import whose_masks
from dd.store.provenance import read_own, write_json
from dd.store.schemas import STUDY
from dd.taxonomy import Taxonomy

SHOWN = 5  # runs named in a line about several
SUBTITLE = (
    "Masks read from a text-to-image model's attention, the segmenter trained on them, and "
    "what real labels add."
)


@dataclass(frozen=True)
class Material:
    """What a report is made from: finished ``runs`` (folders) on ``domains``.

    ``tests``: the test images of each domain that is at hand, for the galleries. ``synthetic`` with
    its mask set ``masks``: what the main rows were trained on, where there is a choice
    (:func:`dd.report.rows.arrange`). ``baseline``: a run (folder) of the recipe that others are
    compared with; None = the main one of synthetic images alone, else the first row. ``budgets``:
    budget.json files to show. ``missed``: run folders that the pattern of ``runs`` leaves out.
    ``accept``: the IoU in percent that a class must reach; None = not asked. ``prices``: of labels
    and of the machine.
    """

    runs: Sequence[str | Path]
    tests: Mapping[str, SegmentationFolder]
    synthetic: str | Path
    taxonomy: Taxonomy
    domains: list[str]
    masks: str = "SegmentationClass"
    baseline: str | Path | None = None
    budgets: Sequence[str | Path] = ()
    missed: Sequence[str | Path] = ()
    accept: float | None = None
    prices: Prices = field(default_factory=Prices)


def report(folder: str | Path, title: str, given: Material) -> Path:
    """Write ``folder/summary.json`` and ``folder/report.html``; returns the page.

    Results that were edited, come from another version or were measured on other images or classes,
    second runs of one recipe and seed, and runs that are not finished or never evaluated are kept
    apart, with the reason. ValueError if nothing is left, if the baseline is not among the runs, or
    for another taxonomy than theirs.
    """
    folder, synthetic, domains = Path(folder), Path(given.synthetic), given.domains
    found, left_out = collect(given.runs, synthetic)
    base = None if given.baseline is None else _given(found, given.baseline)
    left_out += separate(found, base["name"] if base else None)
    rows, left_out = _arranged(found, left_out, given)
    entries = [e for row in rows for e in row.runs]
    _check_classes(entries, domains, given.taxonomy)
    chosen = _usual(rows) if base is None else _row_of(rows, base)
    times = Counter(e["recipe"].segmenter for e in entries)
    main = max(times, key=lambda name: (times[name], name))
    # curves and class tables are about one segmenter
    alike = [row for row in rows if row.recipe.segmenter == main]
    summary = summarise(alike, folder, domains, synthetic)
    found_verdicts = verdicts(alike, domains)
    write_json(folder / "summary.json", summary | {"verdict": as_plain(found_verdicts)})
    budgets = [(read_own(path, STUDY), Path(path).parent.name) for path in given.budgets]
    headline = results.headline(rows, domains)
    studied = [section for found in budgets for section in studies.budget_sections(*found)]
    curves, tables = _budget_curves(studied, [*results.learning_curves(alike, domains)])
    grouped = {d: text for d, t in given.tests.items() if (text := recorded_groups(t.root))}
    said = verdict_section(found_verdicts, alike, grouped)
    worth = found_verdicts[0][0].worth if found_verdicts else None
    accepted = list(acceptance_sections(alike, domains, given.accept))
    sections = [
        said,
        *accepted,
        *curves,
        *results.large_pictures(alike, synthetic, given.tests, given.taxonomy),
        cost_section(synthetic, entries, given.prices, worth),
    ]
    folded = [
        headline,
        *(section for d in domains for section in whose_masks(entries, d)),
        labels_section(entries),
        *(section for d in domains for section in reproduction(d, results.measured(rows, d))),
        *tables,
        *_comparisons(rows, domains, chosen),
        *results.class_tables(alike, domains),
        *results.ablation_table(summary, domains),
        *studies.learning_curves(
            [row.runs[0] for row in alike if row.variant is None], lambda e: e["recipe"].words
        ),
        *_looks(entries, given),
        *results.synthetic_gallery(synthetic, given.taxonomy),
        *results.real_galleries(alike, given.tests, given.taxonomy),
        *studies.sweep_sections(synthetic),
        *origins.left_out_section(left_out),
        *origins.run_sections(entries),
        page.Table(
            "What the page rests on", ["what", "which"], _facts(rows, domains, summary, grouped)
        ),
    ]
    print_verdict(said)
    for table in (*accepted, headline):
        print_table(table)
    html = page.render(title, SUBTITLE, sections, folded=folded)
    return page.write(folder / "report.html", html)


def _budget_curves(
    studied: Sequence[Section], of_runs: Sequence[Section]
) -> tuple[list[Section], list[Section]]:
    """(the label-budget curve of each domain, which the page shows first; all other sections of
    label budgets): the curves of a study, which has more points, else those of the runs."""
    shown: list[Section] = [
        s for s in studied if isinstance(s, page.Chart) and "how much labelling" in s.title
    ]
    rest = [s for s in studied if s not in shown]
    return (shown, [*rest, *of_runs]) if shown else ([*of_runs], rest)


def _arranged(found: list[Entry], left_out: LeftOut, given: Material) -> tuple[list[Row], LeftOut]:
    """(rows of the entries, all that is left out), which is said on the terminal too. ValueError
    if nothing is left."""
    silent = [e["name"] for e in found if not e["metrics"]]
    measured = [e for e in found if e["metrics"]]
    rows, twice = arrange(measured, Path(given.synthetic).name, given.masks)
    why = "finished and never evaluated: evaluate.py run=... data=... scores it"
    left_out = [*left_out, *twice, *_several(silent, why)]
    why = "below the same folder, and the pattern of runs leaves it out"
    left_out += _several(list(map(str, given.missed)), why)
    for what, why in left_out:
        Console(stderr=True, soft_wrap=True).print(
            f"not compared: {what}: {why}", markup=False, highlight=False
        )
    rows, short = without_short_controls(rows)
    left_out += short
    if not rows:
        reasons = "".join(f"\n  {what}: {why[:300]}" for what, why in left_out[:5])
        raise ValueError(
            f"report: none of {[str(r) for r in given.runs][:5]} is a finished run with an "
            f"evaluation{reasons}"
        )
    return rows, left_out


def _facts(
    rows: list[Row], domains: list[str], summary: dict[str, Any], grouped: Mapping[str, str]
) -> list[list[page.Cell]]:
    """[name, value]; what is not known is left out."""
    miou, seconds = summary["mask_miou"], summary["seconds"]
    facts = {
        "Runs": str(sum(len(row.runs) for row in rows)),
        "Recipes": str(len(rows)),
        "Seeds": ", ".join(map(str, summary["seeds"])),
        "Test images": ", ".join(f"{d} {n:,}" for d, n in images_of(rows, domains).items() if n),
        "Splits": "; ".join(f"{d}: {text}" for d, text in grouped.items()),
        "Mask mIoU on noised real test scenes": f"{miou:.1f}" if miou else "",
        "Seconds per stage": ", ".join(f"{k} {v:.0f}" for k, v in seconds.items() if v),
    }
    return [[k, v] for k, v in facts.items() if v]


def print_verdict(section: page.VerdictSection) -> None:
    """The sentences of the page on the terminal."""
    console = Console(soft_wrap=True)
    for findings, decided in section.parts:
        console.print(f"{findings} {decided}".strip(), markup=False, highlight=False)


def print_table(section: page.Table) -> None:
    """A section of the page on the terminal."""
    table = RichTable(title=section.title)
    for name, cell in zip(section.columns, section.cells()[0], strict=True):
        table.add_column(name, justify="right" if cell["numeric"] else "left")
    for row in section.cells():
        table.add_row(*(cell["text"] for cell in row))
    Console().print(table)


def _given(entries: list[Entry], baseline: str | Path) -> dict[str, Any]:
    """The entry whose folder is ``baseline``."""
    for entry in entries:
        if entry["folder"].resolve() == Path(baseline).resolve():
            return entry
    names = ", ".join(str(e["folder"]) for e in entries[:8]) + (", ..." if len(entries) > 8 else "")
    raise ValueError(f"baseline={baseline}: none of the evaluated runs, which are {names}")


def _row_of(rows: list[Row], entry: dict[str, Any]) -> Row:
    """The row of a run's recipe."""
    found = next((row for row in rows if row.recipe.key == entry["recipe"].key), None)
    if found is None:
        raise ValueError(
            f"baseline={entry['folder']} has no evaluation that can be compared; evaluate it again"
        )
    return found


def _usual(rows: list[Row]) -> Row:
    """The row that others are compared with unless one is given."""
    mains = [row for row in rows if row.variant is None] or rows
    return next((row for row in mains if row.recipe.arm == "synthetic_only"), mains[0])


def _several(names: list[str], why: str) -> list[tuple[str, str]]:
    """One line about several runs."""
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [(", ".join(sorted(names)[:SHOWN]) + more, why)]


def _check_classes(entries: list[Entry], domains: list[str], taxonomy: Taxonomy) -> None:
    for entry in entries:
        for domain in domains:
            names = list(entry["metrics"].get(domain, {}).get("iou", taxonomy.all_names))
            if names != list(taxonomy.all_names):
                raise ValueError(
                    f"{entry['folder']} was evaluated with the classes {names}, and data says "
                    f"{list(taxonomy.all_names)}; give the report the data of the runs (data=...)"
                )


def _comparisons(rows: list[Row], domains: list[str], chosen: Row) -> Iterator[Section]:
    for domain in domains:
        there = [row for row in rows if row.scores(domain)]
        if sum(len(row.runs) for row in there) > 1:
            baseline = chosen if chosen in there else _usual(there)
            yield comparison(f"Differences on {domain}", there, domain, baseline)


def _looks(entries: list[Entry], given: Material) -> Iterator[Section]:
    """Confusions, best and worst predictions of the best run on each domain."""
    for domain in given.domains:
        if (best := results.best_run(entries, domain)) is not None:
            yield from results.confusions(best, domain)
            if domain in given.tests:
                names = given.taxonomy.all_names
                yield from results.extremes(best, domain, given.tests[domain], names)
