"""Train a segmenter on synthetic or real images, or the embedded generator.   python train.py experiment=shapes_synthetic"""

from functools import partial

from dd import config
from dd.datamodule import SegmentationData
from dd.segmenters.transforms import EvalTransform
from dd.stages.train import train
from dd.stages.train_text_to_image import train_text_to_image


def run(cfg) -> None:
    folder = f"{cfg.output_root}/{cfg.name}"
    if cfg.stage == "text_to_image":
        parts = {k: config.plain(cfg[k]) for k in ("models", "autoencoder", "text_to_image")}
        trainer = config.trainer_factory(cfg)
        model = train_text_to_image(folder, trainer, **parts, num_workers=cfg.num_workers, seed=cfg.seed)
        return print(f"generator in {model}")
    if cfg.stage != "segmenter":
        raise ValueError(f"stage={cfg.stage!r}; allowed: segmenter, text_to_image")

    images, tune = config.training_sets(cfg)
    config.seed_everything(cfg.seed)
    segmenter = config.instantiate(cfg.segmenter, num_classes=len(images.taxonomy))
    module = config.instantiate(cfg.optimizer, segmenter=segmenter, class_names=list(images.taxonomy.all_names))
    data = SegmentationData(
        images, tune, config.instantiate(cfg.transform), EvalTransform(cfg.scale), cfg.batch_size, cfg.num_workers, cfg.seed
    )
    identity, record = config.training_record(cfg, images)
    make_trainer = partial(config.trainer, cfg, validate=tune is not None)
    done = train(folder, module, data, make_trainer, identity, record, init_from=cfg.init_from)
    print(f"{folder}: {done['steps']} steps in {done['seconds']:.0f} s")


if __name__ == "__main__":
    config.main("train", run)
