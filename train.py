"""Train a segmenter, a generator, or an adapter.   python train.py experiment=shapes_synthetic"""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch.utils.data import Subset

from dd import config
from dd.evaluation.budget import Prices
from dd.evaluation.supervision import declared, override
from dd.segmenters.transforms import EvalTransform
from dd.stages.adapt_generator import adapt_generator
from dd.stages.budget import budget
from dd.stages.evaluate import evaluate
from dd.stages.objective import objective
from dd.stages.train import fill, load_weights, train
from dd.stages.train_text_to_image import train_text_to_image
from dd.stages.tune import tune
from dd.store.locks import Lock
from dd.store.provenance import read_json
from dd.training.callbacks import Report
from dd.training.datamodule import SegmentationData
from dd.training.fitting import fit
from dd.training.loggers import is_main_process, tell
from dd.training.search import corners, overrides
from dd.training.segmentation import Views

STAGES = ("segmenter", "text_to_image", "adapt_generator", "tune", "budget")


def run(cfg) -> float | None:
    if cfg.stage not in STAGES:
        raise ValueError(f"stage={cfg.stage!r}; allowed: {', '.join(STAGES)}")
    if config.debugged() and cfg.stage != "segmenter":
        raise ValueError(
            f"debug={config.debugged()} tries the training of stage=segmenter; got "
            f"stage={cfg.stage}"
        )
    if cfg.stage == "text_to_image":
        parts = {k: config.plain(cfg[k]) for k in ("models", "autoencoder", "text_to_image")}
        folder, trainer = Path(cfg.output_root, cfg.name), config.trainer_factory(cfg)
        config.one_device(cfg, "the embedded generator is trained on one device")
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder, hint="Generators of another name are trained beside it"):
            model = train_text_to_image(
                folder,
                trainer,
                **parts,
                num_workers=cfg.num_workers,
                seed=cfg.seed,
                init_from=cfg.init_from,
                trained_with=config.trainer_identity(cfg),
            )
        return print(f"generator in {model}")
    stages = {"tune": search, "budget": label_budget, "segmenter": segmenter}
    return (stages | {"adapt_generator": adapt})[cfg.stage](cfg)


def adapt(cfg) -> None:
    """LoRA layers of a generator on unlabelled photographs."""
    arguments, folder = config.adaptation(cfg), Path(cfg.output_root, cfg.name)
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, hint="Adapters of another name are trained beside it"):
        file = adapt_generator(folder, trainer=config.trainer_factory(cfg), **arguments)
    print(f"adapter in {file}: generate.py diffusion.adapter={folder}")


def segmenter(cfg, report=None) -> float | None:
    """Train a segmenter; returns its objective, mIoU on the tune split. ``report`` hears of each
    validation."""
    folder, trainers, failed = f"{cfg.output_root}/{cfg.name}", [], True
    images, tuning = config.training_sets(cfg)
    judging = config.judging_set(cfg, tuning)
    config.seed_everything(cfg.seed)
    network = config.instantiate(cfg.segmenter, num_classes=len(images.taxonomy))
    teacher, photos = config.self_training(cfg, len(images.taxonomy))
    module = config.instantiate(
        cfg.optimizer,
        segmenter=network,
        class_names=list(images.taxonomy.all_names),
        teacher=teacher,
    )
    data = SegmentationData(
        images,
        tuning,
        config.instantiate(cfg.transform),
        EvalTransform(cfg.scale),
        cfg.batch_size,
        cfg.num_workers,
        cfg.seed,
        photos,
    )
    if config.debugged():
        return try_out(cfg, module, data, network)
    identity, record = config.training_record(cfg, images, tuning, photos and photos[0], network)

    def make_trainer():
        if (lost := images.unchecked()) and is_main_process():
            print(
                f"not checked: whether {lost} of {len(images)} images are as they were (their set "
                "records no hashes)"
            )
        trainers.append(config.trainer(cfg, tuning is not None, [Report(report)] if report else []))
        tell(trainers[0], "begin", config.plain(cfg), record["trained_on"], cfg.init_from)
        return trainers[0]

    try:
        done, value = (
            train(folder, module, data, make_trainer, identity, record, init_from=cfg.init_from),
            None,
        )
        if is_main_process():
            took = f"{done['steps']} steps in {done['seconds']:.0f} s"
            print(
                f"{folder}: {took}"
                if trainers
                else f"{folder}: finished before ({took}), nothing to train"
            )
        if judging is not None and is_main_process():
            fill(network, load_weights(folder), folder)
            how = {
                "device": config.device(cfg),
                "bf16": record["bf16"],
                "num_workers": cfg.num_workers,
            }
            value = objective(folder, network, judging, Views(cfg.scale), cfg.batch_size, **how)
            print(f"{folder}: mIoU {value:.2f} on {judging.split}, the objective")
        for trainer in trainers:
            tell(trainer, "end", done, value)
        failed = False
    finally:
        for trainer in trainers:
            tell(trainer, "finish", failed)
    return value


def try_out(cfg, module, data, network) -> None:
    """A debug run: the training as it is set, whose folder is never a run's and from which
    nothing goes on."""
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


def search(cfg) -> float:
    """Hyper-parameters that give the best mIoU on the tune split."""
    config.check_tuning(cfg)
    space, folder = config.search_space(cfg), f"{cfg.output_root}/{cfg.name}"
    for corner in corners(space):
        config.trial(cfg, "trial=0", corner, check_only=True)
    how = {k: v for k, v in config.plain(cfg.tune).items() if k != "space"}
    identity, labels = (
        config.study_identity(cfg, space) | {"content": config.study_content(cfg)},
        config.judged_labels(cfg),
    )
    keys = dict.fromkeys(key.rpartition(".")[2] for key in space)
    record = [override(f"chosen_on.{key}", labels) for key in keys]

    def train_trial(number, settings, report):
        chosen = [*overrides(settings, space), *record]
        return segmenter(config.trial(cfg, f"trial={number}", chosen), report)

    known = {"chosen_on": declared(labels), "record": record}
    best = tune(folder, train_trial, identity, space, **how, seed=cfg.seed, **known)
    judges = (
        f"{cfg.hold_out} images held out"
        if cfg.hold_out is not None
        else f"{cfg.data.name}/{cfg.data.tune_split}"
    )
    print(
        f"{folder}/best.yaml: mIoU {best['objective']:.2f} on {judges} with "
        f"{' '.join(best['overrides'])}"
    )
    return best["objective"]


def label_budget(cfg) -> None:
    """mIoU against the number of real labelled images, with and without synthetic ones."""
    plan, identity = config.budget_plan(cfg)
    given, how = (
        config.plain(cfg.budget),
        {"device": config.device(cfg), "num_workers": cfg.num_workers},
    )

    def train_job(job):
        part = config.budget_run(cfg, job, choices=plan.choices)
        folder, told = Path(part.output_root, part.name), ("seconds", "steps", "chosen_on")
        segmenter(part)
        done = read_json(folder / "run.json")
        return {"run": folder, **{k: v for k, v in done.items() if k in told}}

    def judge(job):
        return segmenter(config.budget_run(cfg, job, judged=True, choices=plan.choices))

    def score(job, domain):
        part = config.budget_run(cfg, job, choices=plan.choices)
        folder, trusted = Path(part.output_root, part.name), part.segmenter.get("trusted", False)
        trained, network, views = config.trained_run(folder, trusted)
        path = folder / "eval" / domain / "metrics.json"
        with Lock(folder, hint="The same command again goes on"):
            found = evaluate(path, trained, network, config.budget_test(cfg, domain), views, **how)
        stored = path.with_name(found["per_image"]["file"])
        return {"miou": found["miou"], "num_images": found["num_images"], "per_image": stored}

    money, spent = Prices(**(given["prices"] or {})), config.generation_seconds(cfg)
    budget(
        f"{cfg.output_root}/{cfg.name}",
        plan,
        train_job,
        judge,
        score,
        identity,
        money,
        given["targets"],
        spent,
    )
    print(f"{cfg.output_root}/{cfg.name}/budget.json")


if __name__ == "__main__":
    config.main("train", run)
