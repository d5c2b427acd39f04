"""Prompts -> Stable Diffusion images, heat maps and masks.   python generate.py experiment=shapes"""

from dd import config
from dd.datasets import SegmentationFolder
from dd.stages.label import label
from dd.stages.probe import probe
from dd.stages.synthesize import synthesize

STAGES = ("all", "synthesize", "label", "probe")


def run(cfg) -> float | None:
    if cfg.stage not in STAGES:
        raise ValueError(f"stage={cfg.stage!r}; allowed: {', '.join(STAGES)}")
    masks, taxonomy = config.instantiate(cfg.masks), config.taxonomy(cfg)
    if cfg.stage in ("all", "synthesize"):
        generator = config.instantiate(cfg.diffusion, device=config.device(cfg))
        prompts = config.instantiate(cfg.prompts)
        done = synthesize(
            cfg.folder, generator, prompts, taxonomy, cfg.num_images, cfg.seed, cfg.unit_size, cfg.image_format
        )  # fmt: skip
        print(f"{done['images']} images in {cfg.folder}, {done['made_now']} made now in {done['seconds']:.0f} s")
    if cfg.stage in ("all", "label"):
        print(f"masks in {label(cfg.folder, masks, cfg.mask_set)}")
    if cfg.stage == "probe":
        generator = config.instantiate(cfg.diffusion, device=config.device(cfg))
        data = SegmentationFolder(cfg.data.root, cfg.probe.split, taxonomy, cfg.data.masks)
        path = f"{cfg.output_root}/{cfg.name}/probe_{cfg.data.name}_{cfg.probe.split}.json"
        append = cfg.prompts.append
        result = probe(path, generator, data, masks, cfg.probe.timesteps, append, cfg.probe.limit)
        print(f"mask mIoU on {result['num_images']} noised real images of {cfg.probe.split}: {result['miou']:.2f} ({path})")
        return result["miou"]


if __name__ == "__main__":
    config.main("generate", run)
