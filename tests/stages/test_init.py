"""A guided start: from class names and folders to an experiment that runs."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dd import __main__ as commands
from dd import config
from dd.cli import questions
from dd.data.datasets import encode_image, encode_mask, read_mask
from dd.stages.init import Site, few_to_score, site_taxonomy, strange_words
from dd.taxonomy import taxonomy
from tests.doors import door

ROOT = Path(__file__).parents[2]
CLASSES = ["--class", "pallet=skid", "--class", "fork lift", "--class", "worker=man,woman"]


@pytest.fixture
def site(tmp_path):
    """A folder with a copy of conf/, five labelled photographs and two others."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for folder in ("photos", "images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(7):
        rng = np.random.default_rng(i)
        image, mask = (
            rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            np.zeros((64, 64), np.uint8),
        )
        mask[10:40, 10:40] = i % 3 + 1
        (tmp_path / ("photos" if i > 4 else "images") / f"p{i}.png").write_bytes(
            encode_image(image, ".png")
        )
        if i < 5:
            (tmp_path / f"masks/p{i}.png").write_bytes(encode_mask(mask))
    return tmp_path


def init(site, *arguments, name="my-site"):
    return commands.main(
        ["init", name, "--root", str(site / "data"), "--conf", str(site / "conf"), *arguments]
    )


def labelled(site):
    return [
        "--images",
        str(site / "images"),
        "--masks",
        str(site / "masks"),
        "--photos",
        str(site / "photos"),
    ]


def compose(site, root, *overrides):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(site / "conf"), version_base="1.3"):
        cfg = hydra.compose(
            root, overrides=[*overrides, f"data_root={site}/data", f"output_root={site}/outputs"]
        )
    OmegaConf.set_struct(cfg, True)
    return cfg


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_runs_from_prompts_to_a_deployed_segmenter(site, capsys, monkeypatch):
    phrases = ["--condition", "place=in a hall", "--condition", "lighting=dim light,neon light"]
    assert init(site, *CLASSES, *phrases, *labelled(site), "--generator", "embedded") == 0
    said = capsys.readouterr()
    assert "python train.py experiment=my-site_budget" in said.out
    assert "warning: 1 labelled image is kept for the score, a fifth of all" in said.err
    modules = {name: door(name) for name in ("generate", "train", "evaluate")}
    images = ["num_images=4", "unit_size=2", "diffusion.steps=1", "device=cpu"]
    modules["generate"].run(compose(site, "generate", "experiment=my-site", *images))
    plan = [
        json.loads(line)
        for line in (site / "data/synthetic/my-site/plan.jsonl").read_text().splitlines()
    ]
    assert len(plan) == 4 and all(
        " in a hall" in s["prompt"] and len(s["classes"]) == 1 for s in plan
    )
    small = [
        "batch_size=2",
        "scale=64",
        "segmenter.base_channels=8",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
        "trainer.max_steps=1",
    ]
    for recipe, more in (
        ("synthetic", []),
        ("finetune", ["shots=2"]),
        ("mixed", ["shots=2"]),
        ("real", ["shots=2"]),
    ):
        modules["train"].run(compose(site, "train", f"experiment=my-site_{recipe}", *small, *more))
    scored = compose(
        site, "evaluate", f"run={site}/outputs/my-site_*", "data=my-site", "device=cpu"
    )
    modules["evaluate"].run(scored)
    for recipe in ("synthetic", "finetune", "mixed", "real"):
        metrics = json.loads(
            (site / f"outputs/my-site_{recipe}/eval/my-site/metrics.json").read_text()
        )
        assert (
            set(metrics["iou"]) == {"background", "pallet", "fork lift", "worker"}
            and metrics["num_images"] == 1
        )
    adapter = [
        "adapter.max_steps=1",
        "adapter.samples.seeds=1",
        "adapter.generator.steps=1",
        "batch_size=2",
    ]
    quiet = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    modules["train"].run(
        compose(site, "train", "experiment=my-site_adapt_generator", *quiet, *adapter)
    )
    adapted = ["name=my-site_adapted", f"diffusion.adapter={site}/outputs/my-site_adapt_generator"]
    modules["generate"].run(compose(site, "generate", "experiment=my-site", *images, *adapted))
    again = [f"synthetic={site}/data/synthetic/my-site_adapted"]
    modules["train"].run(
        compose(site, "train", "experiment=my-site_adapt_segmenter", *small, *again)
    )
    modules["evaluate"].run(
        compose(site, "evaluate", f"run={site}/outputs/my-site_adapt_segmenter", "data=my-site")
    )
    run = json.loads((site / "outputs/my-site_adapt_segmenter/run.json").read_text())
    assert (
        run["supervision"] == "B"
        and run["trained_on"]["self_training"]["photographs"]["number"] == 2
    )
    monkeypatch.chdir(site)
    onnx = [
        "run=outputs/my-site_adapt_segmenter",
        "images=photos",
        "taxonomy=data/my-site.yaml",
        "output=site.onnx",
    ]
    assert commands.main(["deploy", *onnx]) == 0
    said = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples/onnx_predict.py"),
            "site.onnx",
            "photos/p5.png",
            "mask.png",
        ],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    mask = read_mask("mask.png")
    assert (
        mask.shape == (64, 64)
        and mask.max() <= 3
        and set(re.findall(r"^(.+):", said.stdout, re.M)) <= set(metrics["iou"])
    )
    study = compose(site, "train", "experiment=my-site_budget")
    assert list(study.study.shots) == [0, "all"] and study.study.experiments.real == "my-site_real"


def test_captions_and_a_language_model_are_at_hand(site):
    assert (
        init(site, *CLASSES, "--condition", "lighting=dim light", "--photos", str(site / "photos"))
        == 0
    )
    cfg = compose(site, "generate", "experiment=my-site")
    assert cfg.caption.images == str(site / "photos") and cfg.diffusion.model.endswith(
        "stable-diffusion-v1-5"
    )
    assert compose(site, "train", "experiment=my-site_mixed").trainer.precision == "bf16-mixed"
    cfg = compose(site, "generate", "experiment=my-site", "prompts=my-site_llm", "prompts.model=m")
    assert cfg.prompts.conditions == "dim light" and "LanguageModel" in cfg.prompts._target_
    assert taxonomy(site / "data/my-site.yaml").synonyms["worker"] == ("man", "woman")


@pytest.mark.full
def test_the_study_runs_with_the_root_script_itself(site):
    assert init(site, *CLASSES, *labelled(site), "--generator", "embedded") == 0
    shutil.copytree(ROOT / "dd", site / "dd", ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("generate.py", "train.py"):
        shutil.copy(ROOT / script, site)
    small = [
        "batch_size=2",
        "scale=64",
        "segmenter.base_channels=8",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
        "trainer.max_steps=1",
        "study.seeds=[0]",
    ]
    for command in (
        ["generate.py", "experiment=my-site", "num_images=4", "unit_size=2", "diffusion.steps=1"],
        ["train.py", "experiment=my-site_budget", *small],
    ):
        done = subprocess.run(
            [sys.executable, *command, "device=cpu"], cwd=site, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    arms = json.loads((site / "outputs/my-site_budget/budget.json").read_text())["arms"]
    assert all(arms[arm]["all"]["my-site"][0] is not None for arm in ("finetune", "mixed", "real"))


def test_again_changes_nothing_and_other_answers_are_refused(site, capsys):
    assert init(site, *CLASSES, *labelled(site)) == 0
    before = tree(site)
    assert init(site, *CLASSES, *labelled(site)) == 0 and tree(site) == before
    assert init(site, *CLASSES, "--class", "box") == 2 and tree(site) == before
    error = capsys.readouterr().err
    assert "my-site.yaml" in error and "other content; nothing was changed" in error
    (site / "conf/experiment/other_real.yaml").write_text("mine")
    before = tree(site)
    assert init(site, *CLASSES, name="other") == 2 and tree(site) == before
    assert "other_real.yaml exists" in capsys.readouterr().err
    assert init(site, *CLASSES, name="voc") == 2 and tree(site) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--class", "Pallet", "--class", "pallet"],
            "'pallet' means both class 'Pallet' and 'pallet'",
        ),
        (["--class", "gold ring", "--class", "gold-ring"], "'gold-ring' means both"),
        (
            ["--class", "pallet", "--class", "Pallets"],
            "'Pallets' means both class 'pallet' and 'Pallets'",
        ),
        (["--class", "knives", "--class", "knife"], "'knife' means both"),
        (["--class", "cup=mug", "--class", "Mug"], "'Mug' means both"),
        (["--class", "cup=mug", "--class", "glass=MUG"], "'MUG' means both"),
        (["--class", "cup,mug"], "'cup,mug' holds a comma"),
        (["--class", " "], "empty word"),
        (["--class", "cup="], "nothing follows the ="),
        (["--class", "cup", "--class", "cup=mug"], "given twice"),
        (["--class", "background"], "always class 0"),
        (["--class", "Ignored"], "pixels that do not count"),
        (["--class", "size: small"], "a character that captions cannot"),
        (
            [x for i in range(255) for x in ("--class", f"thing {i}")],
            "255 classes, a mask holds at most 254",
        ),
        (["--class", "cup", "--photos", "nowhere"], "no folder nowhere"),
        (["--class", "cup", "--photos", "{site}/conf"], "no file"),
        (["--class", "cup", "--images", "{site}/images"], "both --images and --masks"),
        (
            ["--class", "cup", "--images", "{site}/images", "--masks", "nowhere"],
            "no folder nowhere",
        ),
        (["--class", "cup", "--condition", "light=${oc.env:HOME}"], "without braces"),
        (["--class", "cup", "--condition", "Light!=dim"], "expected a word"),
        ([], "asks only on a terminal"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(site, capsys, monkeypatch, arguments, expected):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = tree(site)
    assert init(site, *(a.replace("{site}", str(site)) for a in arguments)) == 2
    assert expected in capsys.readouterr().err and tree(site) == before


def test_classes_that_do_not_fit_the_masks_can_be_given_anew(site, capsys):
    before = tree(site)
    assert init(site, *CLASSES[:4], *labelled(site)) == 2 and tree(site) == before
    assert "p2.png" in capsys.readouterr().err  # the mask that holds 3
    assert init(site, *CLASSES, *labelled(site)) == 0


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "a.b", "3", "on", "Null"])
def test_a_name_is_that_of_files(site, capsys, name):
    assert (
        commands.main(
            [
                "init",
                "--root",
                str(site / "data"),
                "--conf",
                str(site / "conf"),
                *CLASSES,
                "--",
                name,
            ]
        )
        == 2
    )
    assert "letters, digits" in capsys.readouterr().err


def test_too_few_images_to_score_on_are_said():
    assert few_to_score(30) is None
    assert few_to_score(29).startswith("29 labelled images are kept for the score")
    assert "Label 150 images or more" in few_to_score(29)


def test_letters_that_the_tokenizer_hardly_knows_are_shown():
    notes = strange_words(site_taxonomy(Site("s", {"сапог": [], "cup": ["tazón"]})))
    assert (
        len(notes) == 2
        and "10 pieces Ñ ģ" in notes[0]
        and "CLIP's" in notes[0]
        and "'tazón'" in notes[1]
    )
    assert not strange_words(site_taxonomy(Site("s", {"gold ring": ["band"]})))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_it_asks(site, monkeypatch):
    answers = [
        "pallet",
        "skid, euro pallet",
        "pallet",
        "worker",
        "",
        "",
        "in a hall",
        "",
        "",
        "",
        "",
    ]
    answers += [str(site / "images"), str(site / "masks"), "embedded", "yes"]
    terminal = Terminal("".join(f"{a}\n" for a in answers))
    monkeypatch.setattr("sys.stdin", terminal)
    for path in (site / "masks").glob("*.png"):
        path.write_bytes(encode_mask(np.ones((64, 64), np.uint8)))
    assert init(site) == 0
    found = taxonomy(site / "data/my-site.yaml")
    assert found.names == ("pallet", "worker") and found.synonyms == {
        "pallet": ("skid", "euro pallet")
    }
    assert (
        'place: ["in a hall"]' in (site / "conf/prompts/my-site.yaml").read_text()
        and not terminal.read()
    )
    assert (site / "data/my-site/dataset.json").is_file()


def test_each_answer_is_checked_at_once_and_none_is_lost(site, monkeypatch, capsys):
    """A wrong name, class, synonym, phrase, folder and generator are each asked for again."""
    answers = ["my site", "my-site", "pallet", "", "Pallets", "cup,mug", "cup", "pallet", "mug", ""]
    answers += [
        "in {a} hall",
        "in a hall",
        "",
        "",
        "",
        str(site / "masks/none"),
        f"'{site}/photos'",
    ]
    answers += [f'"{site}/images"', str(site / "photos"), "sd99", "", "no"]
    (site / "photos/note.txt").write_text("")
    monkeypatch.setattr("sys.stdin", terminal := Terminal("".join(f"{a}\n" for a in answers)))
    before = tree(site)
    assert init(site, name="my site!") == 1 and tree(site) == before and not terminal.read()
    said = capsys.readouterr()
    for why in (
        "name 'my site!': expected letters",
        "name 'my site': expected",
        "'Pallets' means both",
        "'cup,mug' holds a comma",
        "'pallet' means both",
        "expected phrases without braces",
        "there is no folder",
        "'sd99' is none of sd15, embedded",
        "nothing was written",
        "sd15: Stable Diffusion 1.5, 512 px: needs its weights and a GPU",
    ):
        assert why in said.out, why
    assert "  classes: pallet, cup (mug)\n  place: in a hall\n  photographs: 2\n" in said.out


def test_a_summary_says_how_many_images_are_for_the_score(site, capsys):
    for i in range(5, 24):
        for folder in ("images", "masks"):
            shutil.copy(site / folder / f"p{i % 3}.png", site / folder / f"p{i}.png")
    assert init(site, *CLASSES, *labelled(site)) == 0
    said = capsys.readouterr()
    assert "  labelled: 24: 19 to train on, 5 for the score, few\n" in said.out
    assert "warning: 5 labelled images are kept for the score" in said.err


@pytest.mark.parametrize(
    ("answer", "path"),
    [
        ("'/a b/c'", "/a b/c"),
        ('"/a b"', "/a b"),
        ("/a\\ b\\(1\\)", "/a b(1)"),
        ("/a'b", "/a'b"),
        ("'", "'"),
    ],
)
def test_what_a_terminal_puts_around_a_dragged_path(answer, path):
    assert questions.dragged(answer) == path


def test_a_mistyped_folder_is_asked_for_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    answers = iter(["~/photo", "~/photos"])
    assert questions.ask_folder("photographs", ask=lambda _: next(answers)) == str(
        tmp_path / "photos"
    )
    assert f"no folder {tmp_path}/photo\n" in capsys.readouterr().out
    assert questions.ask_folder("photographs", ask=lambda _: "") is None


def test_a_path_that_a_configuration_would_read_otherwise(site, monkeypatch, capsys):
    (site / "a$b").mkdir()
    shutil.move(site / "photos", site / "a$b/photos")
    monkeypatch.chdir(site / "a$b")
    assert (
        init(site, *CLASSES, "--photos", "photos") == 2
        and "a path with $" in capsys.readouterr().err
    )


def test_questions_that_end_early_write_nothing(site, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal("pallet\n\n"))
    before = tree(site)
    assert (
        init(site) == 2
        and "nothing was written" in capsys.readouterr().err
        and tree(site) == before
    )
    assert questions.ask_conditions(ask=lambda _: "") == {}


def test_it_writes_to_the_working_folder_and_never_into_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/v/bin/dataset-diffusion", "init"])
    before = tree(config.CONF)
    given = ["init", "my-site", *CLASSES, "--generator", "embedded"]
    assert commands.main(given) == 0 and tree(config.CONF) == before
    assert "dataset-diffusion generate experiment=my-site\n" in capsys.readouterr().out
    text = (tmp_path / "conf/experiment/my-site.yaml").read_text()
    assert "# dataset-diffusion generate experiment=my-site\n" in text and ".py" not in text
    made = tree(tmp_path)
    for argv in (["/v/bin/dataset-diffusion"], ["generate.py"]):  # another word for the same
        monkeypatch.setattr("sys.argv", argv)
        assert commands.main(given) == 0 and tree(tmp_path) == made
    assert commands.main(["init", "voc", *CLASSES]) == 2 and tree(tmp_path) == made
    assert "is a file of this package" in capsys.readouterr().err


def test_every_command_of_the_walk_through_exists(site, monkeypatch, tmp_path):
    """Root scripts' commands with the site's name in place; python -m dd commands run in a
    folder with what they name."""
    assert init(site, *CLASSES, *labelled(site)) == 0
    monkeypatch.setattr(config.composition, "CONF", site / "conf")
    blocks = "".join(
        re.findall(r"```bash\n(.*?)```", (ROOT / "docs/own-site.md").read_text(), re.DOTALL)
    )
    lines = [
        re.sub(r"\s#\s.*", "", line).strip() for line in blocks.replace("\\\n", " ").splitlines()
    ]
    seen = Counter()
    monkeypatch.chdir(site)
    shutil.copytree(site / "images", site / "labelled/images")
    shutil.copytree(site / "masks", site / "labelled/masks")
    shutil.rmtree(site / "data")
    for line in filter(None, lines):
        program, *arguments = shlex.split(line.replace("<", "").replace(">", ""))[1:]
        seen[program] += 1
        if program == "-m":
            conf = (
                ["--conf", str(tmp_path / f"conf{seen[program]}")] if arguments[1] == "init" else []
            )
            if "--class" in arguments or arguments[1] == "prepare":
                assert commands.main([*arguments[1:], *conf]) == 0, line
        else:
            overrides = [config.quoted(a.replace("=model", "=m")) for a in arguments]
            config.check_overrides(program.removesuffix(".py"), overrides)
    assert (
        seen["-m"] >= 4
        and seen["generate.py"] >= 4
        and seen["train.py"] >= 3
        and seen["evaluate.py"] >= 2
    )
