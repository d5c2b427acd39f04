"""A site's label-budget study and the page about its runs: each number of the page is the
study's."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dd import __main__ as commands
from dd import config
from dd.data.datasets import encode_image, encode_mask
from dd.store.provenance import read_json
from tests.doors import door

ROOT = Path(__file__).parents[2]
STEPS = {
    540: 2,
    600: 3,
    60: 1,
}  # of init's recipes: as many in the fair control as before and after
NAMES = {
    "finetune": "synthetic, then {k} real",
    "mixed": "synthetic and {k} real",
    "real": "{k} real only",
}
TOTAL = {"finetune": 3, "mixed": 3, "real": 3, "real_short": 1}


def rows_of(html: str, title: str) -> list[list[str]]:
    """The cells of a table of the page, as text."""
    section = re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", html, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", section.split("<tbody>")[1], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>\s*(.*?)\s*</t[hd]>", row, re.DOTALL) for row in rows]
    return [
        [re.sub(r"<span.*", "", cell, flags=re.DOTALL).strip() for cell in row] for row in cells
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """``init`` with the embedded generator, its study of few steps, and the report over all
    runs."""
    root = tmp_path_factory.mktemp("site")
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for i in range(15):
        rng = np.random.default_rng(i)
        image, mask = (
            rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            np.zeros((64, 64), np.uint8),
        )
        mask[10:40, 10:40] = i % 2 + 1
        image[mask > 0] //= 2 + mask[mask > 0, None]
        (root / f"images/p{i}.png").write_bytes(encode_image(image, ".png"))
        (root / f"masks/p{i}.png").write_bytes(encode_mask(mask))
    where = ["--root", str(root / "data"), "--conf", str(root / "conf"), "--generator", "embedded"]
    labels = ["--images", str(root / "images"), "--masks", str(root / "masks")]
    assert (
        commands.main(["init", "yard", "--class", "pallet", "--class", "worker", *where, *labels])
        == 0
    )
    for path in (root / "conf/experiment").glob("yard_*.yaml"):
        path.write_text(
            re.sub(r"(max_steps: )(\d+)", lambda m: f"{m[1]}{STEPS[int(m[2])]}", path.read_text())
        )

    patch = pytest.MonkeyPatch()
    patch.chdir(root)  # whose conf/ holds the site's files
    scripts = {name: door(name) for name in ("generate", "train", "evaluate")}
    here = [f"data_root={root}/data", f"output_root={root}/outputs", "device=cpu"]

    def call(script, *overrides):
        cfg = config.compose(script, [f"hydra.searchpath=[file://{root}/conf]", *overrides, *here])
        OmegaConf.set_struct(cfg, True)
        return scripts[script].run(cfg)

    call("generate", "experiment=yard", "num_images=4", "unit_size=2", "diffusion.steps=1")
    small = [
        "batch_size=2",
        "scale=64",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
    ]
    study = ["study.shots=[0,8,all]", "study.seeds=[0]", "study.choose.shots=8"]
    patch.setattr(sys, "argv", ["train.py", "experiment=yard_budget", *small, *study, *here])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        config.main(scripts["train"])
    assert stop.value.code == 0
    call("evaluate", "stage=report", f"report.runs={root}/outputs", "data=yard", "name=page")
    yield root
    patch.undo()
    GlobalHydra.instance().clear()


def test_the_summary_has_the_fair_control(site):
    study = read_json(site / "outputs/yard_budget/budget.json")["arms"]
    summary = json.loads((site / "outputs/page/summary.json").read_text())
    short = study["real_short"]["8"]["yard"]
    assert short != study["real"]["8"]["yard"]  # else nothing is told apart
    for k in ("8", "all"):
        assert [summary["real_only"][k]["yard"]] == study["real"][k]["yard"]
        assert [summary["finetuned"][k]["yard"]] == study["finetune"][k]["yard"]
    assert [summary["synthetic_only"]["yard"]] == study["finetune"]["0"]["yard"]


def test_every_number_of_the_first_table_is_the_studys(site):
    study = read_json(site / "outputs/yard_budget/budget.json")["arms"]
    found = {
        (row[0], row[-2]): row[1]
        for row in rows_of((site / "outputs/page/report.html").read_text(), "Results")
    }
    expected = {("synthetic only", "3"): study["finetune"]["0"]["yard"]}
    for arm, name in NAMES.items():
        for k in ("8", "all"):
            expected[name.format(k=k), "3"] = study[arm][k]["yard"]
    assert found == {key: f"{value:.1f}" for key, (value,) in expected.items()}
