"""Where the settings files lie: those of this package, and those of the working folder."""

from collections.abc import Iterable
from pathlib import Path

INSTALLED = Path(__file__).parents[1] / "conf"  # a wheel brings conf/ there (pyproject.toml)
CHECKOUT = Path(__file__).parents[2]  # its conf/ and scripts lie beside dd/
CONF = INSTALLED if INSTALLED.is_dir() else CHECKOUT / "conf"


def groups(folder: Path) -> list[str]:
    """The groups of a folder of settings: its folders."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def choices(folders: Iterable[Path], group: str) -> list[str]:
    """Names of the files of a group in any of ``folders``."""
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def of_working_folder(package: Path = CONF) -> Path | None:
    """``conf`` in the working folder, if it holds groups of ours and is not that of ``package``."""
    here = Path.cwd() / "conf"
    ours = any((here / group).is_dir() for group in groups(package))
    return here if ours and here.resolve() != package.resolve() else None
