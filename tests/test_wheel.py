"""The package as it is installed: what a wheel holds, and a wheel at work in an empty folder."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
SMALL = ["num_images=4", "unit_size=2", "diffusion.steps=2"]


def test_every_room_is_named_as_a_package():
    rooms = {p.parent.relative_to(ROOT) for p in (ROOT / "dd").rglob("__init__.py")}
    assert sorted([*(".".join(r.parts) for r in rooms), "dd.conf"]) == sorted(SETUP["packages"])


def test_every_file_that_is_no_module_is_named_as_data():
    told = subprocess.run(["git", "ls-files", "dd"], cwd=ROOT, capture_output=True, text=True)
    files = [f.removeprefix("dd/") for f in told.stdout.split() if not f.endswith(".py")]
    assert files
    patterns = [p.replace("**/", "") for p in SETUP["package-data"]["dd"]]
    assert [f for f in files if not any(fnmatch(f, p) for p in patterns)] == []
    assert {p.suffix for p in (ROOT / "conf").rglob("*") if p.is_file()} == {".yaml"}


def test_the_pinned_versions_are_those_that_the_package_allows():
    locked = (ROOT / "requirements.lock").read_text()
    assert "\nargcomplete==3." in locked
    assert any(d.startswith("argcomplete>=3") for d in PROJECT["project"]["dependencies"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Environment variables with which ``dataset-diffusion`` of a wheel is found: in an environment
    of its own, which sees the libraries of this one. No network."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in ("dd", "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "-w", "wheels"]
    subprocess.run([*pip, *build], check=True, cwd=source, capture_output=True)
    venv.create(place, with_pip=False)
    bin_ = place / ("Scripts" if os.name == "nt" else "bin")
    there = sysconfig.get_path("purelib", vars={"base": str(place)})
    completing = importlib.util.find_spec("argcomplete")
    assert completing is not None, "argcomplete is not installed: requirements.lock names it"
    libraries = {sysconfig.get_path("purelib"), str(Path(completing.origin).parents[1])}
    (Path(there) / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    where = ["--python", str(bin_ / "python"), "install", "--no-deps", "--no-index"]
    wheels = map(str, (source / "wheels").glob("*.whl"))
    subprocess.run([*pip, *where, *wheels], check=True, capture_output=True)
    path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    hidden = ("PYTHONPATH", "DD_TRACEBACK")
    kept = {k: v for k, v in os.environ.items() if k not in hidden}
    return {**kept, "PATH": path, "PLACE": str(there)}


@pytest.fixture
def call(installed, tmp_path):
    """``call(*arguments, **environment)``: ``dataset-diffusion``, in an empty folder."""

    def call(*arguments, program=("dataset-diffusion",), **environment):
        return subprocess.run(
            [*program, *arguments],
            env=installed | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return call


def command(folder):
    return json.loads((folder / "run.json").read_text())["command"]


@pytest.mark.full
def test_images_in_an_empty_folder(call, installed, tmp_path):
    done = call("generate", "experiment=shapes", "num_images=4")
    assert done.returncode == 0, done.stderr
    data = tmp_path / "data/synthetic/shapes"
    assert len(list((data / "SegmentationClass").glob("*.png"))) == 4
    assert command(data) == "dataset-diffusion generate experiment=shapes num_images=4"
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert (data / "README.md").is_file()  # its template is in the wheel
    for given, says in (
        (["train", "experiment=shapes_real"], "made by: dataset-diffusion prepare shapes"),
        (["generate", "experiment=shapes", "masks.bnad=3"], "Did you mean 'band'"),
        (["verify", "nowhere"], "Make one with dataset-diffusion generate"),
    ):
        done = call(*given)
        assert done.returncode == 2 and says in done.stderr and ".py" not in done.stderr
    assert call("verify", str(data)).stdout.endswith(f"{data}: whole\n")
    where = call("-c", "import dd; print(dd.__path__[0])", program=("python",)).stdout
    assert where.strip().startswith(installed["PLACE"])


@pytest.mark.full
def test_a_site_of_the_working_folder_and_every_way_to_run_it(call, installed, tmp_path):
    """What init writes is read before the package's; sweeps, launchers and workers see it too."""
    package = Path(installed["PLACE"])
    before = {p: p.stat().st_mtime_ns for p in package.rglob("*.yaml")}
    assert len(before) > 60 and (package / "dd/conf/generate.yaml") in before
    done = call("init", "trial", "--class", "pallet", "--class", "cup", "--generator", "embedded")
    assert done.returncode == 0, done.stderr
    text = (package / "dd/conf/masks/paper.yaml").read_text()
    (tmp_path / "conf/masks").mkdir()
    mine = text.replace("threshold: 0.6", "threshold: 0.2")
    (tmp_path / "conf/masks/paper.yaml").write_text(mine)
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    trial = ["experiment=trial", "masks=paper", *SMALL]
    for how, names in {
        ("executor.workers=2", "executor.spawn=true"): [""],
        ("-m", "seed=0,1"): ["/seed=0", "/seed=1"],
        ("-m", "seed=2,3", *joblib): ["/seed=2", "/seed=3"],
    }.items():
        done = call("generate", *how, *trial)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("conf/masks/paper.yaml is read instead of") == 1
        for name in names:
            data = tmp_path / f"data/synthetic/trial{name}"
            masks = json.loads((data / "SegmentationClass/masks.json").read_text())
            assert masks["identity"]["settings"]["threshold"] == 0.2
            assert command(data) == " ".join(["dataset-diffusion generate", *how, *trial])
    assert before == {p: p.stat().st_mtime_ns for p in package.rglob("*.yaml")}
    tiny = ["segmenter.base_channels=8", "scale=64", "batch_size=4", "trainer.max_steps=1"]
    two = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    done = call("train", "experiment=trial_synthetic", *tiny, *two, "num_workers=0")
    assert done.returncode == 0, done.stderr  # the second process is told the same command
    assert command(tmp_path / "outputs/trial_synthetic").startswith("dataset-diffusion train ")


@pytest.mark.full
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ge", ["generate "]),
        ("export c", ["coco", "cvat"]),
        ("generate experiment=s", ["shapes "]),
        ("train -m trainer.max_st", ["trainer.max_steps="]),
    ],
)
def test_a_shell_completes_commands_and_settings(call, tmp_path, typed, offered):
    line = f"dataset-diffusion {typed}"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said"),
        "_ARGCOMPLETE_COMP_WORDBREAKS": "\"'><=;|&(:",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    done = call(**asked)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").read_text().split("\n") == offered
