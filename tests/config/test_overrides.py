"""What is typed on the command line: read as it was meant, or answered with the names there are."""

import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dd import config
from dd.config.composition import replaced, with_own_folders

FILLED = {"train": ["name=a_run"]}


@pytest.mark.parametrize(
    ("root", "override", "parts"),
    [
        (
            "generate",
            "num_image=3",
            ["no key 'num_image' at the top level", "num_images", "Did you mean 'num_images'?"],
        ),
        (
            "generate",
            "sede=3",
            ["no key 'sede' at the top level", "name, ", "Did you mean 'seed'?"],
        ),
        (
            "generate",
            "masks=papre",
            ["no such masks; allowed: paper, refined", "Did you mean 'paper'?"],
        ),
        ("generate", "mask=paper", ["no key 'mask' at the top level", "Did you mean 'masks'?"]),
        (
            "generate",
            "masks.treshold=0.5",
            ["no key 'treshold' in masks", "threshold, band", "Did you mean 'threshold'?"],
        ),
        (
            "evaluate",
            "probe.splitt=tune",
            ["no key 'splitt' in probe", "split, timesteps, limit", "Did you mean 'split'?"],
        ),
        (
            "generate",
            "experiment=shape",
            ["no such experiment; allowed: ", "Did you mean 'shapes'?"],
        ),
        (
            "train",
            "segmenter=deeplabv3_r50",
            ["no such segmenter; allowed: deeplabv3, dinov2_dpt, dinov2_linear", "Did you mean"],
        ),
        (
            "train",
            "trainer.callbacks.ema.decy=0.9",
            ["no key 'decy' in trainer.callbacks.ema", "Did you mean 'decay'?"],
        ),
        ("train", "segmenter.depth.x=1", ["no key 'x' in segmenter.depth"]),
        (
            "train",
            "hydra/launcher=ray",
            ["no such hydra/launcher; installed: basic, ", 'pip install -e ".[sweeps]"'],
        ),
        (
            "train",
            "hydra/sweeper=optuna",
            ["no such hydra/sweeper; installed: basic; ", "train.py stage=search"],
        ),
        ("evaluate", "dta=voc", ["no key 'dta' at the top level", "Did you mean 'data'?"]),
    ],
)
def test_mistyped_overrides_are_answered_with_the_names_there_are(root, override, parts):
    with pytest.raises(ValueError) as error:
        config.check_overrides(root, [*FILLED.get(root, []), override])
    assert str(error.value).startswith(f"{override!r}: ")
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_key_of_another_choice_is_told_where_it_is():
    """Nothing is set that no step of the masks reads."""
    with pytest.raises(ValueError, match="no key 'power' in masks; .*It is a key of masks=paper"):
        config.check_overrides("generate", ["experiment=shapes", "masks.power=1"])
    config.check_overrides("generate", ["experiment=shapes", "masks=paper", "masks.power=1"])


def test_keys_of_an_experiment_are_known():
    config.check_overrides(
        "train", ["experiment=shapes_autoencoder", "generator.models.tokenizer_merges=50"]
    )
    with pytest.raises(
        ValueError,
        match="no key 'tokenizer_merge' in generator.models; .*Did you mean 'tokenizer_merges'",
    ):
        config.check_overrides(
            "train", ["experiment=shapes_autoencoder", "generator.models.tokenizer_merge=50"]
        )


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=shapes_real", "shots=16,64", "seed=0,1,2"],
        ["segmenter=deeplabv3,segformer", "name=a"],
        ["name=a", "seed=range(0,3)"],
        ["name=a", "segmenter=glob(*)"],
        ["name=a", "+trainer.accumulate_grad_batches=2"],
        ["name=a", "~trainer.callbacks.samples"],
        ["name=a", "hydra/launcher=joblib"],
        ["name=a", "hydra/launcher=submitit_slurm", "seed=0,1"],
    ],
)
def test_good_overrides_pass(overrides):
    config.check_overrides("train", overrides)


@pytest.mark.parametrize(
    "override", ["experiment=shapes_real,shapes_rael", "segmenter=deeplabv3,deeplabv3_r5"]
)
def test_each_choice_of_a_sweep_must_exist(override):
    with pytest.raises(ValueError, match="no such (experiment|segmenter); allowed"):
        config.check_overrides("train", ["name=a", override])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("run=outputs/a/shots=16,seed=0", 'run="outputs/a/shots=16,seed=0"'),
        ("run='outputs/a/seed=0'", "run='outputs/a/seed=0'"),
        ("seed=0", "seed=0"),
        ("shots=16,64", "shots=16,64"),
        ("--multirun", "--multirun"),
        ("domains=[a=1,b]", "domains=[a=1,b]"),
        ("images=2024", 'images="2024"'),
        ("images=null", "images=null"),
        ("unlabelled.images=2024_10", 'unlabelled.images="2024_10"'),
        ("shots=2024", "shots=2024"),
        ("name=Фото für uns", 'name="Фото für uns"'),
        ("output=Photos (1) & more", 'output="Photos (1) & more"'),
        ("images=[a,b]", "images=[a,b]"),
        ("images=a,b", "images=a,b"),
        ("seed=range(0,3)", "seed=range(0,3)"),
    ],
)
def test_what_hydra_would_read_otherwise_is_quoted(argument, expected):
    assert config.quoted(argument) == expected
    key, _, value = config.quoted(argument).partition("=")
    if value != argument.partition("=")[2]:  # and means what was typed
        parsed = OverridesParser.create().parse_override(f"{key}={value}").value()
        assert parsed == argument.partition("=")[2] and type(parsed) is str


def test_a_name_that_no_file_could_have_is_answered():
    with pytest.raises(ValueError, match=r"no setting or choice has a name of 407 characters"):
        config.check_overrides("generate", [400 * "a" + "=shapes"])


@pytest.mark.parametrize(
    ("root", "overrides", "blamed"),
    [
        (
            "train",
            ["logger=wandb", "loggers.wandb.offline=true", "trainer.max_stps=5"],
            "'trainer.max_stps=5': no key",
        ),
        (
            "train",
            ["segmenter=segformer", "segmenter.size=b1", "seeed=1"],
            "'seeed=1': no key 'seeed' at the top level",
        ),
        (
            "generate",
            ["executor=shard", "executor.index=0", "executor.cnt=2"],
            "'executor.cnt=2': no key 'cnt' in executor",
        ),
        (
            "generate",
            ["data=voc_aug", "data.synthetic=a", "masks.bnd=1"],
            "'masks.bnd=1': no key 'bnd' in masks",
        ),
        (
            "train",
            ["+trainer.accumulate_grad_batches=2", "trainer.max_stps=5"],
            "'trainer.max_stps=5': no key 'max_stps'",
        ),
        (
            "train",
            ["seed=1", "+seed=2"],
            "'+seed=2': Could not append to config. An item is already at 'seed'",
        ),
        (
            "train",
            ["hydra.sweeper.max_batch=2"],
            "'hydra.sweeper.max_batch=2': no key 'max_batch' in hydra.sweeper",
        ),
        ("train", ["trainer={max_stps: 5}"], "'trainer={max_stps: 5}': "),
        ("train", ["experiment=[[1]]"], "'experiment=[[1]]': no such experiment; allowed: coco, "),
        ("train", ["experiment=1"], "'experiment=1': no such experiment"),
        ("train", ["data=null"], "'data=null': no such data; allowed: coco"),
        ("train", ["a b"], "'a b': expected key=value"),
    ],
)
def test_the_wrong_key_is_blamed_and_no_innocent_one(root, overrides, blamed):
    with pytest.raises(ValueError) as error:
        config.check_overrides(root, [*FILLED.get(root, []), *overrides])
    assert str(error.value).startswith(blamed) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("name='", "a quote ' is not closed"),
        ('name="a', 'a quote " is not closed'),
        ("name='a", "a quote ' is not closed"),
    ],
)
def test_a_quote_that_is_not_closed_is_named(override, why):
    with pytest.raises(ValueError) as error:
        config.check_overrides("train", ["seed=1", override])
    assert str(error.value).startswith(f"{override!r}: {why}; a text as it is: name=")


@pytest.mark.parametrize(
    "override",
    [
        "+trainer.accumulate_grad_batches=1,2",
        "++seed=1,2",
        "+trainer.overfit_batches=1",
        "~experiment",
    ],
)
def test_added_keys_may_be_new_and_swept(override):
    config.check_overrides("train", ["name=a", override])


def test_a_sweep_without_m_is_answered():
    with pytest.raises(
        ValueError, match=r"'shots=16,8' stands for several runs: add -m .* shots=\[...\]"
    ):
        config.check_overrides("train", ["name=a", "shots=16,8"], multirun=False)
    config.check_overrides("train", ["name=a", "shots=16,8", "hydra.mode=MULTIRUN"], multirun=False)


# Folders of the user's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of own settings, called as people call theirs; the working folder is another one."""
    folder = tmp_path / "Meine Dateien"
    (folder / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [shapes_synthetic]\nname: mine\nbatch_size: 3\n"
    (folder / "experiment/mine.yaml").write_text(text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return folder


@pytest.mark.parametrize(
    "form",
    [
        ["--config-dir", "{}"],
        ["--config-dir={}"],
        ["-cd", "../Meine Dateien"],
        ['hydra.searchpath=["file://{}"]'],
        ["hydra.searchpath=['{}']"],
        ["+hydra.searchpath=['../Meine Dateien']"],
    ],
)
def test_own_experiments_are_found(own, form):
    sys.argv[1:] = with_own_folders([a.format(own) for a in form])
    assert config.check_overrides("train", ["experiment=mine"]).batch_size == 3
    with pytest.raises(
        ValueError, match="no such experiment; allowed: .*mine.*Did you mean 'mine'"
    ):
        config.check_overrides("train", ["experiment=mein"])


def test_conf_in_the_working_folder_is_found(own, tmp_path):
    own.rename(tmp_path / "here/conf")
    sys.argv[1:] = with_own_folders(["seed=3"])
    assert config.check_overrides("train", ["experiment=mine", "seed=3"]).name == "mine"


def test_a_conf_of_another_program_is_not_read(own, tmp_path):
    (tmp_path / "here/conf/nginx").mkdir(parents=True)
    assert with_own_folders(["seed=3"]) == ["seed=3"]


def test_a_folder_that_is_not_there_is_named(own):
    for form in (["--config-dir", "none"], ["hydra.searchpath=[none]"]):
        with pytest.raises(ValueError, match="=none: no such folder"):
            with_own_folders(form)
    with pytest.raises(
        ValueError, match="--config-name would replace the settings of this package"
    ):
        with_own_folders(["--config-name=mine"])


@pytest.mark.parametrize("place", ["--config-dir", "conf"])
def test_an_own_file_goes_before_that_of_this_package(own, tmp_path, place):
    (own / "experiment/shapes_real.yaml").write_text("# @package _global_\nname: mine\nseed: 7\n")
    (own / "base.yaml").write_text((config.CONF / "base.yaml").read_text().replace("data\n", "D\n"))
    if place == "conf":
        own.rename(tmp_path / "here/conf")
    sys.argv[1:] = with_own_folders(["--config-dir", str(own)] if place == "--config-dir" else [])
    cfg = config.check_overrides("train", ["experiment=shapes_real"])
    assert (cfg.name, cfg.seed, cfg.data_root, cfg.batch_size) == ("mine", 7, "D", 8)
    again = config.compose("train", ["experiment=shapes_real"])  # as other parts of a command do
    assert (again.name, again.data_root) == ("mine", "D")


def test_an_own_file_that_is_no_yaml_is_named(own):
    (own / "experiment/mine.yaml").write_text("# @package _global_\nname: [a\nseed: 1\n")
    sys.argv[1:] = with_own_folders(["--config-dir", str(own)])
    with pytest.raises(ValueError, match=r'in ".*mine.yaml", line 3'):
        config.check_overrides("train", ["experiment=mine"])


def test_of_own_files_those_are_told_that_stand_for_one_of_this_package(own):
    (own / "experiment/shapes_real.yaml").write_text("# @package _global_\nname: mine\n")
    (own / "masks").mkdir()
    (own / "masks/paper.yaml").write_bytes((config.CONF / "masks/paper.yaml").read_bytes())
    sys.argv[1:] = with_own_folders(["--config-dir", str(own)])
    names = ["train", "experiment/mine", "masks/paper"]
    assert replaced(names) == [] and not replaced([])
    assert replaced([*names, "experiment/shapes_real"]) == [own / "experiment/shapes_real.yaml"]
