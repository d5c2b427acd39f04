"""The head of the page of runs: its verdict, classes, pictures and costs; and every number of the
verdict and of the main table found again from the run folders, without the report's code."""

import json
import re
from html import unescape
from statistics import mean, stdev

import numpy as np
import pytest
from scipy.stats import t as student

from dd.data.datasets import SegmentationFolder
from dd.stages.report import Material, report
from dd.taxonomy import taxonomy

IMAGES, SEEDS, SHOTS = 32, (0, 1, 2), (16, 64)
NUMBER = r"[+−-]?\d[\d,]*(?:\.\d+)?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three seeds of synthetic images alone and of 16 and 64 labels with and without them, a short
    control, on 32 test images; and the report about them, with its terminal."""
    from tests.report import conftest as build

    root = tmp_path_factory.mktemp("decided")
    build.make_synthetic(root / "data/synthetic/shapes", 4)
    tests = [build.make_test(root / "data/shapes", IMAGES)]
    runs = root / "outputs/shapes"
    for seed in SEEDS:
        first = build.make_run(runs / f"synthetic/seed={seed}", tests, 0.3 + 0.02 * seed, seed)
        for shots, alone, tuned in ((16, 0.5, 0.25), (64, 0.25, 0.2)):
            name = f"shots={shots},seed={seed}"
            real = ("real", shots)
            build.make_run(runs / f"real/{name}", tests, alone, seed, *real, steps=400)
            build.make_run(runs / f"finetune/{name}", tests, tuned, seed, *real, first, 100)
        build.make_run(
            runs / f"short/shots=16,seed={seed}", tests, 0.8, seed, "real", 16, steps=100
        )
    return root


@pytest.fixture(scope="module")
def page(made):
    shapes = taxonomy("shapes")
    tests = {"shapes": SegmentationFolder(made / "data/shapes", "test", shapes)}
    runs = sorted(p.parent for p in (made / "outputs").glob("**/run.json"))
    synthetic = made / "data/synthetic/shapes"
    given = Material(runs, tests, synthetic, shapes, ["shapes"], accept=60)
    return report(made / "page", "Study", given).read_text()


def section(html, title):
    return re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", html, re.DOTALL)[1]


def rows_of(html, title):
    found = re.findall(r"<tr>(.*?)</tr>", section(html, title).split("<tbody>")[1], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>\s*(.*?)\s*</t[hd]>", row, re.DOTALL) for row in found]
    return [
        [unescape(re.sub(r"<span.*", "", c, flags=re.DOTALL)).strip() for c in row] for row in cells
    ]


def said(html):
    text = re.search(r'<p class="said">(.*?)</p>', html, re.DOTALL)[1]
    return unescape(re.sub(r"</?strong>", "", text))


# ------------------------------------------------------------- numbers again, from the run folders


def confusions(folder):
    with np.load(folder / "eval/shapes/per_image.npz") as stored:
        return stored["confusion"].astype(float)


def miou(counts):
    hit = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hit
    return 100 * float(np.mean(hit[union > 0] / union[union > 0]))


def arm(made, name, shots=None):
    """Confusions of an arm, seed by seed."""
    shown = "" if shots is None else f"shots={shots},"
    return [confusions(made / f"outputs/shapes/{name}/{shown}seed={s}") for s in SEEDS]


def expected_interval(runs, others=None):
    """(value, low, high): Student's interval of runs and of images, these by a bootstrap."""

    def score(times):
        pairs = zip(runs, others or [None] * len(runs), strict=True)
        return [
            miou(np.tensordot(times, a, 1)) - (0 if b is None else miou(np.tensordot(times, b, 1)))
            for a, b in pairs
        ]

    values, rng = score(np.ones(IMAGES)), np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(0, IMAGES, IMAGES), minlength=IMAGES) for _ in range(2000)]
    of_images = float(np.var([mean(score(times)) for times in drawn])) * IMAGES / (IMAGES - 1)
    of_runs = stdev(values) ** 2 / len(values)
    total = of_images + of_runs
    free = total**2 / (of_images**2 / (IMAGES - 1) + of_runs**2 / (len(values) - 1))
    half = student.ppf(0.975, free) * np.sqrt(total)
    return mean(values), mean(values) - half, mean(values) + half


def expected_labels(made):
    """(median, low, high) of the labels with which the control is as good, linear in log k."""
    found = []
    for s in range(len(SEEDS)):
        target = miou(arm(made, "synthetic")[s].sum(0))
        few, many = (miou(arm(made, "real", k)[s].sum(0)) for k in SHOTS)
        assert few < target < many  # a reading, not a bound
        found.append(np.log(16) + (target - few) / (many - few) * np.log(64 / 16))
    half = student.ppf(0.975, 2) * stdev(found) / np.sqrt(3)
    return [float(np.exp(v)) for v in (sorted(found)[1], mean(found) - half, mean(found) + half)]


def test_every_number_of_the_verdict_is_found_again(made, page):
    text = said(page)
    numbers = [float(n.replace("−", "-").replace(",", "")) for n in re.findall(NUMBER, text)]
    alone, tuned = arm(made, "synthetic"), {k: arm(made, "finetune", k) for k in SHOTS}
    control = {k: arm(made, "real", k) for k in SHOTS}
    level, labels = expected_interval(alone), expected_labels(made)
    gains = {k: expected_interval(tuned[k], control[k]) for k in SHOTS}
    expected = [IMAGES, len(SEEDS), *level, *labels, 16, *gains[16], 64, *gains[64], 64]
    assert gains[64][1] > 0 and len(numbers) == len(expected), text
    values = {2, 9, 13}  # means: exact but for rounding; the ends of intervals are a bootstrap's
    for i, (shown, own) in enumerate(zip(numbers, expected, strict=True)):
        if i in (0, 1, 8, 12, 16):
            assert shown == own
        elif i in (5, 6, 7):
            assert shown == round(own)
        elif i in values:
            assert abs(shown - own) < 0.0501
        else:
            mid = max(v for v in values if v < i)
            assert abs(shown - own) < 0.06 + 0.1 * abs(own - expected[mid])
    assert text.endswith("Verdict: worth it up to 64 labels, the most that were measured.")


def test_every_number_of_the_main_table_is_found_again(made, page):
    names = {"synthetic only": ("synthetic", None, 300)}
    for k in SHOTS:
        names[f"synthetic, then {k} real"] = ("finetune", k, 400)
        names[f"{k} real only"] = ("real", k, 400)
    rows = {row[0]: row[1:] for row in rows_of(page, "Results")}
    assert rows.keys() == names.keys()
    for name, (folder, shots, steps) in names.items():
        scores = [miou(counts.sum(0)) for counts in arm(made, folder, shots)]
        shown = f"{mean(scores):.1f} ± {stdev(scores):.1f}"
        assert [rows[name][i] for i in (0, 2, 3)] == [shown, str(len(SEEDS)), str(steps)]
        metrics = made / f"outputs/shapes/{folder}"
        for path in metrics.glob(f"*{'' if shots is None else f'shots={shots},'}*/eval/*/*.json"):
            stored = json.loads(path.read_text())
            counts = np.array(stored["confusion"])
            assert stored["miou"] == pytest.approx(miou(counts))
            assert stored["num_images"] == IMAGES
    assert f"mIoU on shapes ({IMAGES} images)" in section(page, "Results")


def test_the_summary_has_the_verdict(made, page):
    found = json.loads((made / "page/summary.json").read_text())["verdict"]["shapes"]
    assert found["outcome"] == "worth it" and " ".join(found["sentences"]) == said(page)
    assert [g["labels"] for g in found["gains"]] == list(SHOTS)
    assert all(g["p_holm"] >= g["p"] for g in found["gains"])


# -------------------------------------------------------------------------------- order of the page


def test_the_page_begins_with_the_verdict_and_folds_the_rest(page):
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:5] == [
        "Verdict",
        "Which classes to accept on shapes",
        "Label budget: shapes",
        "What it looks like",
        "Costs",
    ]
    starts = [part.split(">")[0] for part in page.split("<section ")[1:]]
    assert [" folded" in start for start in starts] == [False] * 5 + [True] * (len(starts) - 5)
    assert page.count("<details>") == len(starts) - 5 > 5
    assert page.index('class="said"') < page.index("<table")


def test_the_terminal_begins_with_the_verdict(made, page, capsys):
    shapes = taxonomy("shapes")
    runs = sorted(p.parent for p in (made / "outputs").glob("**/run.json"))
    given = Material(runs, {}, made / "data/synthetic/shapes", shapes, ["shapes"])
    report(made / "again", "Study", given)
    out = capsys.readouterr().out
    assert out.split("\n")[0] == said(page) and "Results" in out


def test_a_short_control_leaves_the_tables_and_is_listed(page):
    assert "100" not in [row[-2] for row in rows_of(page, "Results")]
    listed = dict(rows_of(page, "Not compared"))
    assert listed["short/shots=16,seed=1"] == (
        "a short control: 100 steps, where the main one took 400"
    )


def test_classes_are_accepted_by_the_lower_end(made, page):
    names = ["background", *taxonomy("shapes").names]
    rows = {row[0]: row[1:] for row in rows_of(page, "Which classes to accept on shapes")}
    assert list(rows) == names
    counts = confusions(made / "outputs/shapes/synthetic/seed=0")
    for c, name in enumerate(names):
        hit, union = counts[:, c, c], counts[:, c].sum(1) + counts[:, :, c].sum(1) - counts[:, c, c]
        decision, missing, iou, images, *_ = rows[name]
        assert iou.startswith(f"{100 * hit.sum() / union.sum():.1f}")
        assert images == str((counts[:, c].sum(1) > 0).sum())
        low = re.search(r"\[(.*?),", iou)
        assert (decision == "accept") == bool(low and float(low[1]) >= 60)
        assert missing.replace(",", "").isdigit() == decision.startswith("unknown")
    assert rows["background"][0] == "accept"


def test_six_pictures_are_large(page):
    shown = section(page, "What it looks like")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", shown)
    starts = ("Synthetic image", "Heat of", "Mask", "Photograph", "Truth", "Prediction")
    assert [c.startswith(s) for c, s in zip(captions, starts, strict=True)] == [True] * 6
    assert shown.count("<img") == 6


def test_costs_are_the_records(made, page):
    rows = {row[0]: row[1:] for row in rows_of(page, "Costs")}
    assert rows["a synthetic image"] == ["4", "0.5", "0.00", "0.00", "–"]
    assert rows["a training: synthetic only"] == ["3", "60.0", "0.05", "0.10", "–"]
    assert rows["a label"] == ["1", "600.0", "0.17", "3.33", "–"]
    labels = round(expected_labels(made)[0])
    name = f"labels that synthetic images replace ({labels})"
    assert rows[name] == [str(labels), "600.0", f"{labels / 6:.2f}", f"{labels / 0.3:.2f}", "–"]


def test_groups_that_splits_keep_together_are_said(made, tmp_path):
    import shutil

    shutil.copytree(made / "data/shapes", tmp_path / "shapes")
    groups = {"by": "cam[0-9]+", "noun": "camera", "number": 14, "splits": {"train": 10, "test": 4}}
    record = {"images": [], "parts": {"all": {"notes": [], "groups": groups}}}
    (tmp_path / "shapes/dataset.json").write_text(json.dumps(record))
    shapes = taxonomy("shapes")
    tests = {"shapes": SegmentationFolder(tmp_path / "shapes", "test", shapes)}
    runs = sorted(p.parent for p in (made / "outputs").glob("**/run.json"))
    given = Material(runs, tests, made / "data/synthetic/shapes", shapes, ["shapes"])
    html = report(tmp_path / "page", "Study", given).read_text()
    told = "shapes: split by group: 14 cameras (train 10, test 4)"
    assert f"{told}." in section(html, "Verdict")
    assert ["Splits", told] in rows_of(html, "What the page rests on")
