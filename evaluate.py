"""mIoU of trained runs, predictions, queues of images to label, audits, self-training, reports."""

from glob import glob
from pathlib import Path

from dd import config
from dd.data.datasets import SegmentationFolder
from dd.report.summary import audited
from dd.stages.evaluate import evaluate, print_table
from dd.stages.predict_images import predict_images, print_predictions
from dd.stages.report import report
from dd.stages.report_dataset import report_dataset
from dd.stages.review import print_review, review
from dd.stages.self_train import self_train
from dd.store.provenance import read_own
from dd.training.scores import log_scores
from dd.training.wandb import log_evaluation

STAGES = ("evaluate", "predict", "review", "audit", "self_train", "report")


def run(cfg) -> float | None:
    if cfg.stage not in STAGES:
        raise ValueError(f"stage={cfg.stage!r}; allowed: {', '.join(STAGES)}")
    if cfg.stage == "report" and cfg.runs is None:
        return print(f"report in {report_dataset(cfg.synthetic, cfg.synthetic_masks, cfg.gallery)}")
    if cfg.stage == "report":
        return print(f"report in {report(**config.report_arguments(cfg))}")
    config.use_own_data(cfg)
    if cfg.stage == "predict":
        given = config.prediction_arguments(cfg)
        return print_predictions(given["target"], predict_images(**given))
    if cfg.stage == "review":
        given = config.review_arguments(cfg)
        return print_review(given["target"], review(**given), given["number"])
    folders = (
        sorted(f for f in glob(str(cfg.run)) if _is_segmenter(Path(f, "run.json")))
        if cfg.run
        else []
    )
    if not folders:
        raise FileNotFoundError(
            f"run={cfg.run}: no finished training run of a segmenter there (a folder with run.json)"
        )
    seen = cfg.trusted, cfg.weights, config.plain(cfg)["scales"], cfg.flip
    how = {k: cfg[k] for k in ("batch_size", "weights", "num_workers")} | {
        "device": config.device(cfg)
    }
    if cfg.stage == "self_train":
        if len(folders) > 1:
            raise ValueError(
                f"run={cfg.run}: a mask set has one teacher, got {len(folders)} runs; name one of "
                "them"
            )
        masks = self_train(
            cfg.synthetic,
            *config.trained_run(folders[0], *seen),
            cfg.mask_set,
            cfg.confidence,
            **how,
        )
        return print(f"masks in {masks}")
    how["per_image"] = cfg.stage == "evaluate"  # an audit may be of a whole synthetic set
    (data, name), results = _data(cfg), {}
    if lost := data.unchecked():
        print(
            f"not checked: whether {lost} of {len(data)} images are as they were (their set "
            "records no hashes)"
        )
    for folder in folders:
        trained, segmenter, views = config.trained_run(folder, *seen)
        path = Path(
            folder, name, views.name, "metrics.json"
        )  # augmented results lie below those of one view
        results[folder] = evaluate(path, trained, segmenter, data, views, **how)
        where = path.parent.relative_to(folder).as_posix()
        log_scores(folder, where, results[folder])
        if cfg.wandb:
            log_evaluation(folder, where, results[folder])
    what = f"{cfg.synthetic} masks" if cfg.stage == "audit" else f"{cfg.data.name}/{cfg.split}"
    print_table(
        results,
        f"IoU on {what} ({data.split}, {len(data)} images{views.name and ', '}{views.name})",
    )
    return next(iter(results.values()))["miou"]


def _is_segmenter(run: Path) -> bool:
    return run.is_file() and "segmenter" in read_own(run, {})


def _data(cfg) -> tuple[SegmentationFolder, str]:
    """(images and masks to score, folder of the result within the run)."""
    taxonomy = config.taxonomy(cfg)
    if cfg.stage == "audit":
        data = SegmentationFolder(cfg.synthetic, cfg.synthetic_split, taxonomy, cfg.synthetic_masks)
        return data, f"audit/{audited(data.fingerprint())}"
    part = "" if cfg.split == cfg.data.test_split else f"-{cfg.split}"
    raw = "" if cfg.weights == "ema" else f"-{cfg.weights}"
    return config.real_data(cfg, cfg.split), f"eval/{cfg.data.name}{part}{raw}"


if __name__ == "__main__":
    config.main("evaluate", run)
