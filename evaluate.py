"""mIoU of trained runs, audits, reports.   python evaluate.py run=outputs/shapes/synthetic data=shapes"""

from glob import glob
from pathlib import Path

from dd import config
from dd.datasets import SegmentationFolder
from dd.provenance import read_json
from dd.segmenters.transforms import EvalTransform
from dd.stages.evaluate import evaluate, print_table
from dd.stages.report import report
from dd.stages.train import load_weights

STAGES = ("evaluate", "audit", "report")


def run(cfg) -> float | None:
    if cfg.stage not in STAGES:
        raise ValueError(f"stage={cfg.stage!r}; allowed: {', '.join(STAGES)}")
    if cfg.stage == "report":
        return print(f"report in {report(**config.report_arguments(cfg))}")
    folders = sorted(f for f in glob(str(cfg.run)) if Path(f, "run.json").exists()) if cfg.run else []
    if not folders:
        raise FileNotFoundError(f"run={cfg.run}: no finished training run there (a folder with run.json)")
    taxonomy, results = config.taxonomy(cfg), {}
    for folder in folders:
        trained = read_json(Path(folder) / "run.json")
        if cfg.stage == "audit":
            data = SegmentationFolder(cfg.synthetic, "train", taxonomy, cfg.masks)
            path = Path(folder, "audit", Path(cfg.synthetic).name, Path(cfg.masks).name, "metrics.json")
        else:
            data = SegmentationFolder(cfg.data.root, cfg.split, taxonomy, cfg.data.masks)
            part = "" if cfg.split == cfg.data.test_split else f"-{cfg.split}"
            raw = "" if cfg.weights == "ema" else f"-{cfg.weights}"
            path = Path(folder, "eval", f"{cfg.data.name}{part}{raw}", "metrics.json")
        segmenter = config.segmenter_of(trained)
        segmenter.load_state_dict(load_weights(folder, cfg.weights))
        transform = EvalTransform(trained["scale"])
        results[folder] = evaluate(
            path, trained, segmenter, data, transform, cfg.batch_size, config.device(cfg), cfg.weights
        )  # fmt: skip
    what = f"{cfg.synthetic} masks" if cfg.stage == "audit" else f"{cfg.data.name}/{cfg.split}"
    print_table(results, f"IoU on {what} ({data.split}, {len(data)} images)")
    return next(iter(results.values()))["miou"]


if __name__ == "__main__":
    config.main("evaluate", run)
