"""What evaluate.py needs for its report."""

from glob import glob
from pathlib import Path

from omegaconf import OmegaConf

from dd.config.command import CONF
from dd.config.objects import taxonomy
from dd.datasets import SegmentationFolder


def report_arguments(cfg) -> dict:
    """What the report stage takes, from an evaluate configuration; ``runs`` is a glob of run folders."""
    runs = sorted(Path(p).parent for p in glob(f"{cfg.runs}/**/run.json", recursive=True)) if cfg.runs else []
    if not runs:
        raise FileNotFoundError(f"runs={cfg.runs}: no finished training run below it (a folder with run.json)")
    return {
        "folder": f"{cfg.output_root}/{cfg.name}", "runs": runs, "tests": test_sets(cfg), "synthetic": cfg.synthetic,
        "taxonomy": taxonomy(cfg), "domains": list(cfg.domains), "title": f"Dataset Diffusion: {cfg.name}",
        "baseline": cfg.baseline, "budgets": sorted(glob(f"{cfg.runs}/**/budget.json", recursive=True)),
    }  # fmt: skip


def test_sets(cfg) -> dict[str, SegmentationFolder]:
    """Test images of each of ``domains`` (names of the data group) that lie on this machine."""
    found = {}
    for domain in cfg.domains:
        file, node = CONF / "data" / f"{domain}.yaml", cfg.data
        if domain != cfg.data.name and file.is_file():
            node = OmegaConf.merge({"data_root": cfg.data_root}, OmegaConf.load(file))
        if Path(node.root).is_dir() and domain in (cfg.data.name, file.stem if file.is_file() else None):
            images = OmegaConf.to_container(node, resolve=True).get("images")
            found[domain] = SegmentationFolder(node.root, node.test_split, taxonomy(cfg), node.masks, images=images)
    return found
