"""Make a model: the stages of train.py."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.utils.data import Subset

from dd import config
from dd.config.doors import Door, Stage
from dd.evaluation.budget import Prices
from dd.evaluation.supervision import declared, override
from dd.segmenters.transforms import EvalTransform
from dd.stages.objective import objective
from dd.stages.score import ScoreSettings, score
from dd.stages.search import Reporting, SearchSettings, search
from dd.stages.study import Measuring, study
from dd.stages.train_adapter import train_adapter
from dd.stages.train_autoencoder import AutoencoderSettings, train_autoencoder
from dd.stages.train_piece import PieceSettings, train_piece
from dd.stages.train_segmenter import fill, load_weights, train_segmenter
from dd.store.commands import spelled
from dd.store.locks import Lock
from dd.store.provenance import read_json
from dd.training.callbacks import Report
from dd.training.datamodule import SegmentationData
from dd.training.fitting import fit
from dd.training.loggers import is_main_process, tell
from dd.training.search import corners, overrides
from dd.training.segmentation import Views


def make_generator(cfg: Any) -> None:
    """The embedded generators, part by part."""
    _not_debugged(cfg)
    if cfg.get("generator") is None:
        raise ValueError(
            "stage=generator needs its settings: experiment=shapes_autoencoder, then "
            "shapes_unet or shapes_mmdit, or an experiment of your own"
        )
    folder, settings = Path(cfg.output_root, cfg.name), config.plain(cfg.generator)
    config.one_device(cfg, "the embedded generator is trained on one device")
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "folder": folder,
        "trainer": config.trainer_factory(cfg),
        "seed": cfg.seed,
        "trained_with": config.trainer_identity(cfg),
    }
    if settings.get("usable"):  # state of a training that may still run
        state = train_piece(settings=PieceSettings(**settings), init_from=cfg.init_from, **given)
        print(f"state in {state}")
        return
    with Lock(folder, hint="Generators of another name are trained beside it"):
        if settings.get("part") == "autoencoder":
            parts = AutoencoderSettings(**settings)
            given["init_from"] = cfg.init_from
            model = train_autoencoder(settings=parts, num_workers=cfg.num_workers, **given)
        else:
            piece = PieceSettings(**settings)
            model = train_piece(settings=piece, init_from=cfg.init_from, **given)
    print(f"generator in {model}")


def make_adapter(cfg: Any) -> None:
    """LoRA layers of a generator on unlabelled photographs."""
    _not_debugged(cfg)
    arguments, folder = config.adaptation(cfg), Path(cfg.output_root, cfg.name)
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, hint="Adapters of another name are trained beside it"):
        file = train_adapter(folder, trainer=config.trainer_factory(cfg), **arguments)
    print(spelled(f"adapter in {file}: generate.py diffusion.adapter={folder}"))


def make_segmenter(cfg: Any, report: Callable[..., None] | None = None) -> float | None:
    """Train a segmenter; returns its objective, mIoU on the tune split. ``report`` is called at
    each validation."""
    folder, trainers, failed = f"{cfg.output_root}/{cfg.name}", [], True
    images, tuning = config.training_sets(cfg)
    judging = config.judging_set(cfg, tuning)
    config.seed_everything(cfg.seed)
    network = config.instantiate(cfg.segmenter, num_classes=len(images.taxonomy))
    teacher, photos = config.self_training(cfg, len(images.taxonomy))
    names = list(images.taxonomy.all_names)
    module = config.instantiate(
        cfg.optimizer, segmenter=network, class_names=names, teacher=teacher
    )
    transforms = config.instantiate(cfg.transform), EvalTransform(cfg.scale)
    how = (cfg.batch_size, cfg.num_workers, cfg.seed, photos)
    data = SegmentationData(images, tuning, *transforms, *how)
    if config.debugged():
        _try_out(cfg, module, data, network)
        return None
    identity, record = config.training_record(cfg, images, tuning, photos and photos[0], network)

    def make_trainer() -> Any:
        if (lost := images.unchecked()) and is_main_process():
            print(
                f"not checked: whether {lost} of {len(images)} images are as they were (their set "
                "records no hashes)"
            )
        callbacks = [Report(report)] if report else []
        trainers.append(config.trainer(cfg, tuning is not None, callbacks))
        tell(trainers[0], "begin", config.plain(cfg), record["trained_on"], cfg.init_from)
        return trainers[0]

    try:
        done = train_segmenter(folder, module, data, make_trainer, identity, record, cfg.init_from)
        value = None
        if is_main_process():
            took = f"{done['steps']} steps in {done['seconds']:.0f} s"
            again = f"finished before ({took}), nothing to train"
            print(f"{folder}: {took if trainers else again}")
        if judging is not None and is_main_process():
            fill(network, load_weights(folder), folder)
            judge = (judging, Views(cfg.scale), cfg.batch_size, config.device(cfg))
            value = objective(folder, network, *judge, record["bf16"], cfg.num_workers)
            print(f"{folder}: mIoU {value:.2f} on {judging.split}, the objective")
        for trainer in trainers:
            tell(trainer, "end", done, value)
        failed = False
    finally:
        for trainer in trainers:
            tell(trainer, "finish", failed)
    return value


def _not_debugged(cfg: Any) -> None:
    if config.debugged():
        raise ValueError(
            f"debug={config.debugged()} tries the training of stage=segmenter; got "
            f"stage={cfg.stage}"
        )


def _try_out(cfg: Any, module: Any, data: SegmentationData, network: Any) -> None:
    """A debug run: the training as configured, in a folder that is never a run's. No run can start
    from it."""
    if cfg.init_from:
        fill(network, load_weights(cfg.init_from), f"init_from={cfg.init_from}")
    if config.debugged() == "overfit":
        data.train = Subset(data.train, range(min(cfg.batch_size, len(data.train))))
    trainer = config.trainer(cfg, data.tune is not None)
    with TemporaryDirectory() as folder:
        fit(trainer, module, data, Path(folder, "last.ckpt"))
    found = {k: v for k, v in trainer.callback_metrics.items() if k in ("train/loss", "tune/miou")}
    shown = " ".join(f"{k}={float(v):.4g}" for k, v in found.items())
    print(
        f"debug={config.debugged()}: {trainer.global_step} steps, {shown} "
        f"({cfg.output_root}/{cfg.name}; no run is kept)"
    )


def make_search(cfg: Any) -> float:
    """Hyper-parameters that give the best mIoU on the tune split."""
    _not_debugged(cfg)
    config.check_tuning(cfg)
    space, folder = config.search_space(cfg), f"{cfg.output_root}/{cfg.name}"
    for corner in corners(space):
        config.trial(cfg, "trial=0", corner, check_only=True)
    given = {k: v for k, v in config.plain(cfg.search).items() if k not in ("space", "spaces")}
    settings = SearchSettings(**given)
    identity = config.study_identity(cfg, space) | {"content": config.study_content(cfg)}
    labels = config.judged_labels(cfg)
    keys = dict.fromkeys(key.rpartition(".")[2] for key in space)
    record = [override(f"chosen_on.{key}", labels) for key in keys]

    def train_trial(number: int, values: dict[str, Any], report: Reporting) -> float | None:
        chosen = [*overrides(values, space), *record]
        return make_segmenter(config.trial(cfg, f"trial={number}", chosen), report)

    best = search(
        folder, train_trial, identity, space, settings, cfg.seed, declared(labels), record
    )
    held = cfg.hold_out is not None
    judges = f"{cfg.hold_out} images held out" if held else f"{cfg.data.name}/{cfg.data.tune_split}"
    print(
        f"{folder}/best.yaml: mIoU {best['objective']:.2f} on {judges} with "
        f"{' '.join(best['overrides'])}"
    )
    return best["objective"]


def make_study(cfg: Any) -> None:
    """mIoU against the number of real labelled images, with and without synthetic ones."""
    _not_debugged(cfg)
    plan, identity = config.budget_plan(cfg)
    given = config.plain(cfg.study)
    how = ScoreSettings(device=config.device(cfg), num_workers=cfg.num_workers)

    def train_job(job: Any) -> dict[str, Any]:
        part = config.budget_run(cfg, job, choices=plan.choices)
        folder, told = Path(part.output_root, part.name), ("seconds", "steps", "chosen_on")
        make_segmenter(part)
        done = read_json(folder / "run.json")
        return {"run": folder, **{k: v for k, v in done.items() if k in told}}

    def judge(job: Any) -> float | None:
        return make_segmenter(config.budget_run(cfg, job, judged=True, choices=plan.choices))

    def score_job(job: Any, domain: str) -> dict[str, Any]:
        part = config.budget_run(cfg, job, choices=plan.choices)
        folder, trusted = Path(part.output_root, part.name), part.segmenter.get("trusted", False)
        trained, network, views = config.trained_run(folder, trusted)
        path = folder / "eval" / domain / "metrics.json"
        with Lock(folder, hint="The same command resumes it"):
            found = score(path, trained, network, config.budget_test(cfg, domain), views, how)
        stored = path.with_name(found["per_image"]["file"])
        return {"miou": found["miou"], "num_images": found["num_images"], "per_image": stored}

    money, spent = Prices(**(given["prices"] or {})), config.generation_seconds(cfg)
    folder, measuring = f"{cfg.output_root}/{cfg.name}", Measuring(train_job, judge, score_job)
    study(folder, plan, measuring, identity, money, given["targets"], spent)
    print(f"{folder}/budget.json")


DOOR = Door(
    "train",
    "Make a model: a segmenter, a generator, an adapter of one, or a study of many trainings.",
    {
        "segmenter": Stage(make_segmenter, "a segmenter on synthetic or real images, or on both"),
        "generator": Stage(make_generator, "the embedded text-to-image model from scratch"),
        "adapter": Stage(make_adapter, "LoRA layers of a generator on unlabelled photographs"),
        "search": Stage(make_search, "hyper-parameters by mIoU on the tune split (Optuna)"),
        "study": Stage(make_study, "mIoU against the number of labels, with and without ours"),
    },
    (
        "python train.py experiment=shapes_synthetic",
        "python train.py experiment=shapes_finetune shots=16",
        "python train.py -m experiment=shapes_real shots=16,64 seed=0,1,2",
    ),
)
