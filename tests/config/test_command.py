"""The command line: what a job is called, what each value may be, how errors are answered and
sweeps go on."""

import errno
import logging
import os
import sys
import typing

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dd import config
from dd.config.check_values import check_settings
from dd.config.command import check_device
from dd.config.objects import check_loaded
from dd.config.settings import SCRIPTS
from dd.store.settings import Settings, words
from tests.doors import watched


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(run, *arguments)`` -> exit status of a root script with this ``run``, in an
    empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DD_TRACEBACK", raising=False)
    handlers, level = logging.root.handlers[:], logging.root.level

    def call(run, *arguments, root="generate"):
        monkeypatch.setattr(sys, "argv", [f"{root}.py", *arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            config.main(watched(root, run))
        return stop.value.code

    yield call
    logging.root.handlers[:], logging.root.level = handlers, level
    torch.set_flush_denormal(False)
    GlobalHydra.instance().clear()


def test_a_command_gets_its_configuration(command):
    seen = []
    assert (
        command(
            lambda cfg: seen.append((cfg.name, cfg.seed, cfg.masks.power)), "seed=3", "masks=paper"
        )
        == 0
    )
    assert seen == [("shapes", 3, 4)]


def test_a_command_writes_no_files_of_its_own(command, tmp_path):
    assert command(lambda cfg: None, "seed=0") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [ValueError("too small"), FileNotFoundError("nowhere"), FileExistsError("other settings")],
)
def test_an_error_is_one_screen(command, capsys, error):
    def run(cfg):
        raise error

    assert command(run, "seed=0") == 2
    assert (
        capsys.readouterr().err == f"error: {error}\n(DD_TRACEBACK=1 shows where it was raised)\n"
    )


def test_a_mistyped_override_ends_before_the_run(command, capsys):
    assert command(pytest.fail, "masks.treshold=0.5") == 2
    assert "Did you mean 'threshold'?" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(command, capsys):
    def run(cfg):
        raise KeyboardInterrupt

    assert command(run, "seed=0") == 130
    assert "stopped: interrupted. The same command resumes from here" in capsys.readouterr().err


def test_a_command_without_arguments_says_how_it_is_used(command, capsys):
    for arguments in ([], ["-m"]):
        assert command(pytest.fail, *arguments) == 2
        said = capsys.readouterr().err
        assert (
            "usage: python generate.py key=value" in said
            and "experiment=coco | shapes | voc\n" in said
        )
        assert "masks=paper | refined" in said and "num_images" in said
    assert command(pytest.fail, root="train") == 2
    assert "experiment=paper_budget | paper_finetune" in capsys.readouterr().err


def test_a_run_without_a_name_is_told_to_have_one(command, capsys):
    assert command(pytest.fail, "seed=1", root="train") == 2
    said = capsys.readouterr().err
    assert (
        "error: name has no default and was not given: add name=<value> to the command, or choose "
        "an experiment" in said
    )


# Multiruns


def test_a_job_that_fails_leaves_the_others(command, capsys):
    done = []

    def run(cfg):
        if cfg.seed == 1:
            raise ValueError("too many")
        if cfg.seed == 2:
            raise RuntimeError("a fault of ours")
        done.append(cfg.name)

    assert command(run, "-m", "seed=0,1,2,3", "hydra.sweep.dir=sweep") == 1
    assert done == ["shapes/seed=0", "shapes/seed=3"]
    said = capsys.readouterr().err
    assert (
        "error in seed=1: too many\n" in said
        and "error in seed=2: RuntimeError('a fault of ours')" in said
    )
    assert said.count("Traceback") == 1  # of what is no mistake of the user's
    assert (
        said.count("too many") == 1
        and "HYDRA_FULL_ERROR" not in said
        and "HYDRA_FULL_ERROR" not in os.environ
    )


def test_a_wrong_value_in_a_sweep_leaves_the_others(command, capsys):
    done = []
    assert (
        command(
            lambda cfg: done.append(cfg.redraw), "-m", "redraw=0,many,2", "hydra.sweep.dir=sweep"
        )
        == 1
    )
    assert (
        done == [0, 2]
        and "error in redraw=many: redraw='many': expected a whole number"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP])
def test_a_path_that_cannot_be_one_is_answered(command, capsys, number):
    def run(cfg):
        raise OSError(number, os.strerror(number), "x" * 300)

    assert command(run, "seed=0") == 2
    said = capsys.readouterr().err
    assert os.strerror(number) in said and "Traceback" not in said


@pytest.mark.parametrize("key", ["hydra.sweep.dir", "hydra.run.dir"])
def test_a_folder_of_hydra_that_leads_nowhere(command, capsys, key):
    assert command(lambda cfg: pytest.fail("runs"), "seed=0", f"{key}=${{nope}}") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {key}: ") and "nope" in said and "HYDRA_FULL_ERROR" not in said


def test_an_interruption_ends_a_sweep(command, capsys):
    done = []

    def run(cfg):
        done.append(cfg.seed)
        raise KeyboardInterrupt

    assert command(run, "-m", "seed=0,1", "hydra.sweep.dir=sweep") == 130 and done == [0]


def test_a_sweep_of_an_experiment_gives_each_job_its_folder(command, tmp_path, monkeypatch):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    swept = "{mode: MULTIRUN, sweep: {dir: sweep}, sweeper: {params: {seed: '0,1'}}}"
    text = f"# @package _global_\ndefaults: [shapes]\nhydra: {swept}\n"
    (tmp_path / "conf/experiment/mine.yaml").write_text(text)
    names = []
    assert command(lambda cfg: names.append((cfg.name, cfg.folder)), "experiment=mine") == 0
    assert names == [(f"shapes/seed={i}", f"data/synthetic/shapes/seed={i}") for i in (0, 1)]


def test_mask_sets_of_a_sweep_are_named_after_it(command):
    names = []
    assert (
        command(
            lambda cfg: names.append((cfg.folder, cfg.mask_set)),
            "-m",
            "experiment=shapes",
            "stage=label",
            "masks.band=0,0.05",
            "hydra.sweep.dir=sweep",
        )
        == 0
    )
    assert names == [("data/synthetic/shapes", f"masks.band={t}") for t in (0, 0.05)]


@pytest.mark.parametrize(
    ("cfg", "swept", "expected"),
    [
        ({"name": "a"}, ["shots=1"], {"name": "a/shots=1"}),
        ({"name": "a/seed=1"}, ["seed=1"], {"name": "a/seed=1"}),
        ({"name": "b"}, ["name=b"], {"name": "b"}),
        (
            {"name": "a", "stage": "label", "mask_set": "sharp"},
            ["masks.power=1"],
            {"mask_set": "sharp,masks.power=1"},
        ),
        ({"name": "a", "stage": "label", "mask_set": "x"}, ["mask_set=x"], {"mask_set": "x"}),
        (
            {"name": "a", "stage": "label", "mask_set": "SegmentationClass"},
            ["name=a", "masks=paper"],
            {"mask_set": "masks=paper"},
        ),
        (
            {"name": "a", "stage": "read", "reader": None},
            ["diffusion=sd15"],
            {"reader": "sd15"},
        ),
        (
            {"name": "a", "stage": "sweep", "sweep": {"name": None}},
            ["sweep.run=out/b"],
            {"sweep": {"name": "sweep.run=out_b"}},
        ),
        (
            {"name": "a", "stage": "filter", "quality": {"split": "good"}},
            ["image_format=png"],
            {"quality": {"split": "good,image_format=png"}},
        ),
    ],
)
def test_jobs_are_named_after_what_is_swept(monkeypatch, cfg, swept, expected):
    monkeypatch.setattr(sys, "argv", ["generate.py", "-m", *(f"{o},other" for o in swept)])
    cfg = OmegaConf.create(cfg)
    before = OmegaConf.to_container(cfg)
    config.name_job(cfg, [*swept, "redraw=3"])
    assert OmegaConf.to_container(cfg) == before | expected


@pytest.mark.parametrize(
    ("arguments", "job", "name"),
    [
        (["seed=3"], ["seed=3"], "a_run"),
        (
            ["-m", "shots=16,64", "seed=0,1", "batch_size=4"],
            ["shots=16", "seed=0", "batch_size=4"],
            "a_run/shots=16,seed=0",
        ),
        (
            ["-m", "segmenter=deeplabv3,segformer"],
            ["segmenter=segformer"],
            "a_run/segmenter=segformer",
        ),
        (["-m", "seed=range(0,3)"], ["seed=2"], "a_run/seed=2"),
        (["-m", "+shots=1,2"], ["+shots=1"], "a_run/+shots=1"),
    ],
)
def test_swept_jobs_have_their_own_folders(monkeypatch, arguments, job, name):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    cfg = OmegaConf.create({"name": "a_run"})
    config.name_job(cfg, job)
    assert cfg.name == name


def test_what_is_typed_may_refer_to_other_keys(command, capsys):
    names = []
    folder = "folder=data/synthetic/seed=${seed}"
    assert (
        command(
            lambda cfg: names.append(cfg.folder), "-m", folder, "seed=0,1", "hydra.sweep.dir=sweep"
        )
        == 0
    )
    assert names == ["data/synthetic/seed=0", "data/synthetic/seed=1"]
    assert command(pytest.fail, "seed=${nope}") == 2
    assert "error: seed='${nope}': there is no key 'nope'\n" in capsys.readouterr().err


def test_the_key_that_refers_to_nothing_is_blamed_and_not_one_that_refers_to_it(command, capsys):
    assert (
        command(pytest.fail, "experiment=shapes_synthetic", "seed=${nope}", root="train") == 2
    )  # its name has the seed
    assert "error: seed='${nope}': there is no key 'nope'\n" in capsys.readouterr().err


# What values may be


def checked(root, *overrides):
    """The configuration that a job has, with every value looked at as in a job."""
    cfg = config.compose(root, list(overrides), return_hydra_config=True)
    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    check_settings(root, cfg)
    check_loaded(cfg)
    check_device(cfg)
    return cfg


@pytest.mark.parametrize(
    ("root", "override", "message"),
    [
        ("generate", "seed=1.5", "seed=1.5: expected a whole number of 0 or more"),
        ("generate", "seed=-1", "seed=-1: expected a whole number of 0 or more"),
        ("generate", "seed=true", "seed=true: expected a whole number"),
        (
            "generate",
            "num_images=many",
            "num_images='many': expected a whole number of 1 or more, or null",
        ),
        ("generate", "num_images=0", "num_images=0: expected a whole number of 1 or more, or null"),
        ("generate", "device=gpu", "device='gpu'; allowed: auto, cpu, cuda"),
        ("generate", "device=cuda:99", r"device=cuda:99, but torch sees \d+ CUDA devices"),
        ("generate", "folder=1.5", "folder=1.5: expected text"),
        ("generate", "folder=null", "folder=null: expected text"),
        (
            "generate",
            "folder=''",
            "folder='': expected a folder; that of the command itself is folder=.",
        ),
        ("generate", "masks_from='a\0b'", "masks_from='a.x00b': expected text without NUL"),
        ("generate", "redraw=null", "redraw=null: expected a whole number of 0 or more"),
        ("generate", "image_format=1.5", "image_format=1.5: expected text"),
        (
            "generate",
            "executor.devices=true",
            "executor.devices=true: expected a list, each text .one at least., or null",
        ),
        (
            "generate",
            "executor.workers=two",
            "executor.workers='two': expected a whole number from 1 to 1024, or null",
        ),
        ("generate", "quality.rules=''", "quality.rules='': expected names with values"),
        ("generate", "data.taxonomy=[]", r"data.taxonomy=\[\]: expected text"),
        ("generate", "masks.band=-1", "masks.band=-1: expected a number of 0 or more"),
        ("evaluate", "sweep.threshold=0.5", "sweep.threshold=0.5: expected a list, each a number"),
        (
            "evaluate",
            "sweep.threshold=[a]",
            r"sweep.threshold=\['a'\]: expected a list, each a number",
        ),
        (
            "generate",
            "+masks.sharp=1",
            "masks.sharp: MaskSettings takes no such setting; allowed: power, threshold",
        ),
        (
            "generate",
            "~executor",
            "executor: removed, but the command needs it; leave ~executor out",
        ),
        ("evaluate", "images=[a,b]", r"images=\['a', 'b'\]: expected text, or null"),
        ("evaluate", "output=[a]", "output="),
        ("evaluate", "run=[a]", "run="),
        ("evaluate", "scales=1", "scales=1: expected a list, each a number above 0"),
        ("evaluate", "scales=[]", r"scales=\[\]: expected a list, each a number above 0"),
        ("evaluate", "scales=[1.0,-1]", r"scales=.*expected a list, each a number above 0"),
        ("evaluate", "flip='yes'", "flip='yes': expected true or false"),
        ("evaluate", "batch_size=0", "batch_size=0: expected a whole number of 1 or more"),
        ("evaluate", "max_pixels=0", "max_pixels=0: expected a whole number from 1 to 178956970"),
        ("evaluate", "max_pixels=178956971", "max_pixels=178956971: expected a whole number"),
        ("evaluate", "predict.every=0", "predict.every=0: expected a whole number of 1 or more"),
        ("evaluate", "report.gallery=0", "report.gallery=0: expected a whole number of 1 or more"),
        ("evaluate", "calibrate.shots=all", "calibrate.shots='all': expected a whole number"),
        (
            "evaluate",
            "calibrate.cross_layers=up_blocks",
            "calibrate.cross_layers='up_blocks': expected a list, each a list",
        ),
        ("evaluate", "sweep.name=../up", "sweep.name='../up'"),
        ("evaluate", "unit_size=many", "unit_size='many': expected a whole number of 1 or more"),
        ("generate", "unit_size=2.5", "unit_size=2.5: expected a whole number .*auto"),
        ("generate", "image_format=gif", "image_format='gif'; allowed: .jpg, .png"),
        ("generate", "caption.batch_size=0", "caption.batch_size=0: expected a whole number"),
        ("train", "real_share=1.0", "real_share=1.0: expected a number above 0, below 1, source="),
        ("train", "real_share=true", "real_share=true: expected a number"),
        ("train", "source=reel", "source='reel': expected synthetic, real, mixed"),
        ("generate", "prompts_over_limit=cut", "prompts_over_limit='cut': expected refuse, trim"),
        ("train", "hold_out=0", "hold_out=0: expected a whole number of 1 or more, or null"),
        (
            "generate",
            "labeler.confidence=high",
            "labeler.confidence='high': expected a number from 0 to 1, or null",
        ),
        ("train", "unlabelled.images=[a,b]", "unlabelled.images="),
        ("train", "num_workers=null", "num_workers=null: expected a whole number of 0 or more"),
        ("train", "shots=1.5", "shots=1.5: expected a whole number of 1 or more, all, or null"),
        ("train", "trainer.callbacks=null", "trainer.callbacks=null: expected names with values"),
        ("train", "~trainer.callbacks", "trainer.callbacks: removed"),
        ("train", "~loggers", "loggers: removed, but the command needs it"),
        ("train", "trainer.max_steps=many", "trainer.max_steps='many': expected a whole number"),
        (
            "train",
            "+trainer.max_stps=5",
            "trainer.max_stps: Trainer takes no such setting; allowed: .*max_steps",
        ),
        (
            "train",
            "optimizer.betas=[0.9]",
            r"optimizer.betas=\[0.9\]: expected a list, each a number",
        ),
        ("train", "optimizer._target_=5", "optimizer._target_=5: expected the class"),
        ("train", "loggers.csv.save_dir=[a]", r"loggers.csv.save_dir=\['a'\]: expected text"),
    ],
)
def test_wrong_values_are_refused_before_any_work(root, override, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        checked(
            root,
            *{"generate": ["experiment=shapes"], "train": ["experiment=shapes_real"]}.get(root, []),
            override,
        )


@pytest.mark.parametrize("name", ["..", "a/../../b", "/etc", "", "[a]", '"a\\nb"', "null"])
def test_names_stay_in_their_folders(name):
    for root, key in (
        ("generate", "name"),
        ("generate", "quality.split"),
        ("generate", "mask_set"),
        ("evaluate", "sweep.name"),
    )[: 2 if name == "null" else 4]:  # null = the default, or named after what is compared
        with pytest.raises(ValueError, match=f"^{key}=.*expected (the name of a folder|text)"):
            checked(root, f"{key}={name}")


def test_what_a_labeler_is_told_fits_its_kind():
    with pytest.raises(ValueError, match="labeler.confidence has no effect .*labeler.run="):
        checked("generate", "labeler.confidence=0.5")


def test_masks_of_a_trained_run_are_a_set_of_their_own(command):
    seen = []
    for more in ([], ["labeler.run=x"], ["labeler.run=x", "mask_set=mine"]):
        assert command(lambda cfg: seen.append(cfg.mask_set), "stage=label", *more) == 0
    assert seen == ["SegmentationClass", "self_training", "mine"]


def test_loggers_are_known():
    with pytest.raises(ValueError, match="logger='wand'.*allowed: csv, tensorboard, mlflow, wandb"):
        checked("train", "name=a", "logger=[csv,wand]")


def test_the_experiment_of_a_set_serves_those_who_examine_it():
    """It may hold keys that only the making of the set needs, as that of ``init`` does."""
    cfg = checked("evaluate", "experiment=shapes", "+caption.images=photos", "stage=probe")
    assert cfg.caption.images == "photos"
    with pytest.raises(ValueError, match="captoin: no such setting"):
        checked("evaluate", "+captoin.images=photos")


def test_usual_values_pass():
    cfg = checked(
        "generate",
        "num_images=null",
        "device=cpu",
        "seed=3",
        "mask_set=1",
        "unit_size=auto",
    )
    assert cfg.mask_set == "1"  # text, though YAML says number
    checked("evaluate", "scales=[1,0.5]", "review.distinct=null", "sweep.power=[0,1]")
    checked("generate", "labeler.run=x", "labeler.confidence=1")
    checked(
        "train",
        "name=a",
        "trainer.devices=[0]",
        "trainer.precision=32",
        "shots=all",
        "~trainer.callbacks.samples",
    )
    checked("train", "name=a", "trainer.callbacks.best=null", "trainer.callbacks.ema=null")
    checked("generate", "+quality.rules.faint={action: absent}", "quality.split=few")
    checked(
        "train",
        "experiment=shapes_budget",
        "study.learning_rates.synthetic=null",
        "study.arms=[real]",
    )
    checked(
        "train",
        "name=a",
        "logger=[csv,tensorboard]",
        "+trainer.accumulate_grad_batches=2",
        "trainer.max_steps=3",
    )


KEYS = {
    root: sorted(
        key
        for key, value in OmegaConf.to_container(
            OmegaConf.load(config.CONF / f"{root}.yaml")
        ).items()
        if key not in ("defaults", "hydra")
    )
    for root in ("generate", "train", "evaluate")
}


@pytest.mark.parametrize("root", sorted(KEYS))
def test_an_interpolation_that_leads_nowhere_is_named(root):
    for key in KEYS[root]:
        with pytest.raises(Exception) as error:
            cfg = config.compose(root, ["name=a"])
            OmegaConf.set_struct(cfg, False)
            cfg[key] = "${nope}"
            check_settings(root, cfg)
        assert (
            config.command._message(error.value, cfg)
            == f"{key}='${{nope}}': there is no key 'nope'"
        )


@pytest.mark.parametrize("root", sorted(KEYS))
def test_every_shipped_key_is_in_the_model(root):
    """Outside the nodes of constructors, whose own models know theirs."""

    def compare(node, model, prefix=""):
        for key, value in node.items():
            assert key in model.model_fields, f"{prefix}{key}"
            inner = model.model_fields[key].annotation
            if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, Settings):
                compare(value, inner, f"{prefix}{key}.")

    node = config.plain(config.compose(root, ["name=a"]))
    node.get("trainer", {}).pop("_target_", None)
    for own in ("use_distributed_sampler", "gradient_clip_val"):  # Lightning's own
        node.get("trainer", {}).pop(own, None)
    compare(node, SCRIPTS[root])


def test_every_kind_can_be_said():
    def said(model):
        for field in model.model_fields.values():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Settings):
                yield from said(inner)
            elif inner is not typing.Any:
                yield words(inner)

    assert all(text for model in SCRIPTS.values() for text in said(model))
    assert (
        words(int | None) == "a whole number, or null" and words(typing.Literal["a", 1]) == "a, 1"
    )
    assert words(tuple[float, float]) == "a list, each a number"


def test_a_file_that_lies_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "site/data").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "site/generate.py")])
    cfg = config.compose("generate", ["data=own", "data.taxonomy=data/werk.yaml"])
    with pytest.raises(FileNotFoundError) as error:
        config.taxonomy(cfg)
    said = config.command._message(error.value, cfg)
    assert f"Relative paths begin at {tmp_path}/other" in said
    assert f"there is {tmp_path}/site/data: data_root={tmp_path}/site/data" in said
    assert "Relative" not in config.command._message(FileNotFoundError("/abs/x is not there"), cfg)


# The data of a run


@pytest.fixture
def trained(tmp_path):
    """``trained(name, **data)``: a run folder as a training leaves it, but for its weights."""

    def make(folder, **more):
        data = {
            "name": "site",
            "taxonomy": "data/site/t.yaml",
            "root": "data/site",
            "images": ["data/a", "/b"],
        }
        data |= {
            "masks": "SegmentationClass",
            "train_split": "train",
            "tune_split": None,
            "test_split": "val",
        } | more
        saved = {"data_root": "data", "synthetic": "data/synthetic/old", "data": data}
        (tmp_path / folder).mkdir()
        OmegaConf.save(OmegaConf.create(saved), tmp_path / folder / "config.yaml")

    return make


def own_data(command, capsys, *arguments):
    seen = []

    def run(cfg):
        config.use_own_data(cfg)
        seen.append(cfg)

    code, said = command(run, *arguments, root="evaluate"), capsys.readouterr()
    return (
        (code, seen[0].data, seen[0].split, seen[0].synthetic, said.out)
        if seen and code == 0
        else (code, said.err)
    )


def test_a_run_is_scored_on_its_own_data(command, capsys, trained):
    trained("a")
    code, data, split, synthetic, said = own_data(command, capsys, "run=a")
    assert (code, data.name, data.root, split, synthetic) == (
        0,
        "site",
        "data/site",
        "val",
        "data/synthetic/old",
    )
    assert said == "data: site in data/site, those of the run; others: data=...\n"
    _, data, _, synthetic, _ = own_data(
        command, capsys, "run=a", "data_root=/mnt", "synthetic=mine"
    )
    assert (data.root, data.taxonomy, data.images, synthetic) == (
        "/mnt/site",
        "/mnt/site/t.yaml",
        ["/mnt/a", "/b"],
        "mine",
    )
    _, data, _, _, said = own_data(command, capsys, "run=a", "data=voc")
    assert data.name == "voc" and said == ""
    assert own_data(command, capsys, "run=none")[1].name == "shapes"


def test_runs_of_several_data_sets_need_a_word(command, capsys, trained):
    trained("a")
    trained("b")
    assert own_data(command, capsys, "run=[ab]")[0] == 2  # a list is no glob
    assert own_data(command, capsys, "run=?", "stage=audit")[1].name == "site"
    trained("c", name="other")
    code, said = own_data(command, capsys, "run=?")
    assert (
        code == 2
        and "these runs were trained with several data sets (site in data/site, other in "
        "data/site); choose one: data=..."
        in said
    )


@pytest.mark.parametrize(
    "wrong", [{"root": 5}, {"root": "${oc.env:HOME}"}, {"test_split": None}, {"images": [[1]]}]
)
def test_settings_of_a_run_that_tell_no_data(command, capsys, trained, tmp_path, wrong):
    trained("a", **{k: v for k, v in wrong.items() if "${" not in str(v)})
    if "${" in str(wrong):
        text = (
            (tmp_path / "a/config.yaml")
            .read_text()
            .replace("root: data/site", "root: ${oc.env:HOME}")
        )
        (tmp_path / "a/config.yaml").write_text(text)
    code, said = own_data(command, capsys, "run=a")
    assert code == 2 and "a/config.yaml does not tell the data of a training" in said


ODD = [
    None,
    True,
    1.5,
    -1,
    "text",
    "",
    [],
    {},
    [[1]],
    {"a": 1},
    "${nope}",
    float("nan"),
    10**20,
    "a\0b",
]


@pytest.mark.parametrize("root", sorted(KEYS))
def test_no_value_of_another_kind_shows_a_foreign_error(root):
    """Each key of each command with one odd value after the other: it passes, or is answered in
    one line."""
    plain = OmegaConf.to_container(config.compose(root, ["name=a"]))
    for i, key in enumerate(plain):
        for value in ODD[i % 3 :: 3]:
            cfg = OmegaConf.create(plain | {key: value})
            OmegaConf.set_struct(cfg, True)
            try:
                check_settings(root, cfg)
                check_loaded(cfg)
                check_device(cfg)
            except config.command.ANSWERED as error:
                said = config.command._message(error, cfg)
                assert key in said and "\n" not in said and len(said) < 600, (key, value, said)


@pytest.mark.parametrize(
    "override",
    ["~executor._target_", "executor._target_=null", "executor._target_=[a]", "masks._target_=''"],
)
def test_a_node_that_is_made_into_an_object_keeps_its_class(command, capsys, override):
    assert command(lambda cfg: config.instantiate(cfg.masks), "seed=0", override) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "~trainer.default_root_dir",
            "trainer.default_root_dir: removed, but the command needs it",
        ),
        ("~trainer.log_every_n_steps", "trainer.log_every_n_steps: removed"),
        ("trainer.callbacks.ema=some", "trainer.callbacks={"),
        ("trainer.callbacks=[1]", "'trainer.callbacks=[1]': Error"),
    ],
)
def test_what_a_training_needs_of_its_trainer(command, capsys, override, message):
    assert command(pytest.fail, "experiment=shapes_real", override, root="train") == 2
    assert f"error: {message}" in capsys.readouterr().err
