"""The stages of evaluate.py: numbers and pages about data and models, neither of which is
changed."""

from collections.abc import Callable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from dd import config
from dd.config.doors import Door, Stage
from dd.data.datasets import SegmentationFolder
from dd.report.summary import audited
from dd.stages.agree import AgreeSettings, agree, print_agreement
from dd.stages.calibrate import calibrate
from dd.stages.estimate import EstimateSettings, estimate_masks, print_estimate
from dd.stages.pilot import PilotSettings, pilot, print_pilot
from dd.stages.predict import predict, print_predictions
from dd.stages.predict_set import predict_set
from dd.stages.probe import probe
from dd.stages.report import report
from dd.stages.report_dataset import report_dataset
from dd.stages.review import print_review, review
from dd.stages.score import ScoreSettings, print_table, score
from dd.stages.sweep import Seen, print_best, sweep, write_page
from dd.store.provenance import read_own
from dd.store.samples import read_plan
from dd.training.log_scores import log_scores
from dd.training.segmentation import Views
from dd.training.wandb import log_evaluation


def score_runs(cfg: Any) -> float:
    """mIoU of runs on a split of real images."""
    config.use_own_data(cfg)
    part = "" if cfg.split == cfg.data.test_split else f"-{cfg.split}"
    raw = "" if cfg.weights == "ema" else f"-{cfg.weights}"
    where = f"eval/{cfg.data.name}{part}{raw}"

    def data() -> tuple[SegmentationFolder, str]:
        return config.real_data(cfg, cfg.split), where

    return _score(cfg, data, f"{cfg.data.name}/{cfg.split}", per_image=True)


def audit_masks(cfg: Any) -> float:
    """Agreement of a synthetic set's masks with runs."""
    config.use_own_data(cfg)

    def data() -> tuple[SegmentationFolder, str]:
        masks = (cfg.synthetic_split, config.taxonomy(cfg), cfg.synthetic_masks)
        images = SegmentationFolder(cfg.synthetic, *masks)
        return images, f"audit/{audited(images.fingerprint())}"

        # without counts of each image: it may be a whole synthetic set

    planned = Path(cfg.synthetic, "plan.jsonl").is_file()
    asked = {s.id: s.class_ids for s in read_plan(cfg.synthetic)} if planned else None
    return _score(cfg, data, f"{cfg.synthetic} masks", per_image=False, asked=asked)


def _score(
    cfg: Any,
    find: Callable[[], tuple[SegmentationFolder, str]],
    what: str,
    per_image: bool,
    asked: Mapping[str, Sequence[int]] | None = None,
) -> float:
    folders, results = _segmenters(cfg.run), {}
    views_of = cfg.trusted, cfg.weights, config.plain(cfg)["scales"], cfg.flip
    data, name = find()
    if lost := data.unchecked():
        print(
            f"not checked: whether {lost} of {len(data)} images are as they were (their set "
            "records no hashes)"
        )
    given = {k: cfg[k] for k in ("batch_size", "weights", "num_workers")}
    settings = ScoreSettings(**given, device=config.device(cfg), per_image=per_image)
    for folder in folders:
        path, views, results[folder] = score_run(folder, name, data, views_of, settings, asked)
        where = path.parent.relative_to(folder).as_posix()
        log_scores(folder, where, results[folder])
        if cfg.wandb:
            log_evaluation(folder, where, results[folder])
    seen = f"{views.name and ', '}{views.name}"
    print_table(results, f"IoU on {what} ({data.split}, {len(data)} images{seen})")
    return next(iter(results.values()))["miou"]


def score_run(
    folder: str | Path,
    name: str,
    data: SegmentationFolder,
    views_of: tuple[Any, ...],
    settings: ScoreSettings,
    asked: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Path, Views, dict[str, Any]]:
    """(metrics.json, how the run looked, its content) of one run on ``data``; ``name``: folder in
    that of the run, ``views_of``: what :func:`dd.config.trained_run` takes beside the folder."""
    trained, segmenter, views = config.trained_run(folder, *views_of)
    # augmented results lie below those of one view
    path = Path(folder, name, views.name, "metrics.json")
    return path, views, score(path, trained, segmenter, data, views, settings, asked)


def _segmenters(pattern: str | None) -> list[str]:
    """Folders of finished trainings of segmenters. FileNotFoundError if there are none."""
    found = sorted(glob(str(pattern))) if pattern else []
    folders = [folder for folder in found if _is_segmenter(Path(folder, "run.json"))]
    if not folders:
        raise FileNotFoundError(
            f"run={pattern}: no finished training run of a segmenter there (a folder with run.json)"
        )
    return folders


def _is_segmenter(run: Path) -> bool:
    return run.is_file() and "segmenter" in read_own(run, {})


def probe_masks(cfg: Any) -> float:
    """Masks of noised real images against their labels."""
    config.masks_from(cfg)
    masks = config.instantiate(cfg.masks)
    generator = config.instantiate(cfg.diffusion, device=config.device(cfg))
    data, append = config.real_data(cfg, cfg.probe.split), cfg.prompts.append
    what = f"{cfg.data.name}_{cfg.probe.split}" + ("" if append else "_append=off")
    path = f"{cfg.output_root}/{cfg.name}/probe_{what}.json"
    result = probe(path, generator, data, masks, cfg.probe.timesteps, append, cfg.probe.limit)
    print(
        f"mask mIoU on {result['num_images']} noised real images of {cfg.probe.split}: "
        f"{result['miou']:.2f} ({path})"
    )
    others = ", ".join(f"{name} {value:.2f}" for name, value in result["ablations"].items())
    print("with", others)
    return result["miou"]


def sweep_masks(cfg: Any) -> float:
    """Mask settings tried on stored heat."""
    config.masks_from(cfg)  # refuses: this stage tries settings of its own
    reference, settings = config.sweep_arguments(cfg)
    if cfg.sweep.run is not None:
        how = {"limit": cfg.sweep.limit, "device": config.device(cfg)}
        trained = config.trained_run(cfg.sweep.run)
        reference = predict_set(cfg.synthetic, *trained, **how)
    result = sweep(cfg.synthetic, reference, settings)
    print_best(result)
    if settings.chains:
        seen = Seen(Path(cfg.synthetic), Path(reference), config.taxonomy(cfg), settings.heat)
        page = write_page(f"{cfg.synthetic}/sweeps/{settings.name}.html", seen, result)
        print(f"chains compared on {page}")
    print(
        f"all in {cfg.synthetic}/sweeps/{settings.name}.json; masks_from=... makes masks with "
        "the best"
    )
    return result["sweep"]["table"][0]["miou"]


def estimate_set(cfg: Any) -> float | None:
    """Quality of masks from a few labels."""
    settings = EstimateSettings(**config.plain(cfg.estimate))
    classes = config.taxonomy(cfg)
    masks = SegmentationFolder(cfg.synthetic, cfg.synthetic_split, classes, cfg.synthetic_masks)
    found = estimate_masks(cfg.synthetic, masks, settings, classes, cfg.seed)
    print_estimate(cfg.synthetic, found)
    return found.get("miou")


def pilot_set(cfg: Any) -> None:
    """What a small set says of a large one; the exit code tells go from stop."""
    settings = PilotSettings(**config.plain(cfg.pilot))
    found = pilot(cfg.synthetic, settings, cfg.synthetic_masks)
    print_pilot(found)
    if found["stop"]:
        raise SystemExit(1)


def compare_masks(cfg: Any) -> float | None:
    """Agreement of two mask sets of a synthetic set."""
    result, page = agree(cfg.synthetic, AgreeSettings(**config.plain(cfg.agree)))
    print_agreement(result)
    print(f"where they differ most: {page}")
    return result["agreement"]["miou"]


def calibrate_masks(cfg: Any) -> float:
    """Mask settings and readings of the attention chosen by a few labelled images."""
    config.masks_from(cfg)  # refuses: this stage tries settings of its own
    path, arguments = config.calibrate_arguments(cfg)
    result = calibrate(path, **arguments)
    found = result["calibration"]
    print(
        f"{result['masks']} fit {found['shots']} labelled images best: mIoU {found['miou']:.2f} "
        f"(masks_from={path})"
    )
    return found["miou"]


def predict_photos(cfg: Any) -> None:
    config.use_own_data(cfg)
    given = config.prediction_arguments(cfg)
    print_predictions(given["target"], predict(**given))


def review_photos(cfg: Any) -> None:
    config.use_own_data(cfg)
    given = config.review_arguments(cfg)
    print_review(given["target"], review(**given), given["settings"].number)


def write_report(cfg: Any) -> None:
    if cfg.report.runs is None:
        page = report_dataset(cfg.synthetic, cfg.synthetic_masks, cfg.report.gallery)
    else:
        page = report(**config.report_arguments(cfg))
    print(f"report in {page}")


DOOR = Door(
    "evaluate",
    "Numbers and pages about data and models; neither is changed.",
    {
        "score": Stage(score_runs, "mIoU of trained runs on real images"),
        "audit": Stage(audit_masks, "agreement of a synthetic set's masks with trained runs"),
        "agree": Stage(compare_masks, "agreement of two mask sets of a synthetic set (agree.b)"),
        "probe": Stage(probe_masks, "masks of noised real images against their labels"),
        "sweep": Stage(sweep_masks, "mask settings tried on stored heat"),
        "estimate": Stage(estimate_set, "mIoU of a set's masks from a few labelled images"),
        "pilot": Stage(pilot_set, "what a small set says of a large one: go or stop"),
        "calibrate": Stage(calibrate_masks, "mask settings chosen by a few labelled images"),
        "predict": Stage(predict_photos, "masks and class areas of your own images or a video"),
        "review": Stage(review_photos, "the photographs a run is least sure of, to label next"),
        "report": Stage(write_report, "one page about runs, or about a synthetic set"),
    },
    (
        "python evaluate.py run=outputs/shapes/synthetic/seed=0",
        "python evaluate.py stage=predict run=outputs/shapes/synthetic/seed=0 images=photos",
        "python evaluate.py stage=report report.runs=outputs/shapes name=shapes",
    ),
    experiments=("generate",),
)
