"""The versions of diffusers that pyproject.toml allows: the oldest one is named where it is
tested, and the one that runs lies in the range."""

import re
import tomllib
from pathlib import Path

import diffusers

ROOT = Path(__file__).parents[2]


def parts(version):
    return tuple(map(int, version.split(".")[:2]))


def test_the_version_that_runs_is_allowed_and_the_oldest_is_tested():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (given,) = (line for line in needed if line.startswith("diffusers"))
    low, high = re.fullmatch(r"diffusers>=([\d.]+),<([\d.]+)", given).groups()
    assert parts(low) <= parts(diffusers.__version__) < parts(high)
    (oldest,) = re.findall(
        r"^OLDEST := diffusers==([\d.]+)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert parts(oldest) == parts(low)
