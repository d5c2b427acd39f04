"""Make or change synthetic data: the stages of generate.py."""

from typing import Any

from dd import config
from dd.config.doors import Door, Stage
from dd.data.quality import Rule, Scores
from dd.stages.caption import caption
from dd.stages.filter import filter_samples, find_absent, print_counts
from dd.stages.label import check_calibration, label
from dd.stages.label_by_run import label_by_run
from dd.stages.label_images import label_images
from dd.stages.read_heat import read_heat
from dd.stages.synthesize import Makers, synthesize
from dd.store.commands import spelled

Quality = tuple[list[Rule], Scores | None]  # rules, and what scores images


def make_captions(cfg: Any) -> None:
    captioner = config.instantiate(cfg.captioner, device=config.device(cfg))
    done = caption(cfg.caption.folder, captioner, cfg.caption.images, cfg.caption.batch_size)
    lost = len(done["unreadable"])
    print(
        f"{done['captions']} captions in {cfg.caption.folder}/captions.jsonl, "
        f"{done['made_now']} made now"
        + (f"; {lost} images cannot be read (unreadable.txt there)" if lost else "")
    )


def make_all(cfg: Any) -> None:
    quality = config.quality(cfg)
    # refuse before hours of work, not after
    if config.labeler_kind(cfg) == "run":
        config.labeler_run(cfg)
    elif config.labeler_kind(cfg) == "model" and config.labeler(cfg).name == "folder":
        raise ValueError(
            "stage=all draws new images, but the masks of labeler=folder belong to existing ones: "
            "first stage=synthesize, then stage=label labeler=folder"
        )
    if make_images(cfg, quality):
        make_masks(cfg, quality)
        if any(rule.action == "drop" for rule in quality[0]):
            make_list(cfg, quality)


def make_images(cfg: Any, quality: Quality | None = None) -> bool:
    """Returns whether the whole plan is done; with shards, only all together can finish it."""
    calibration = config.masks_from(cfg)
    taxonomy, (_, clip) = config.taxonomy(cfg), quality or config.quality(cfg)
    config.instantiate(cfg.masks)  # refuse before hours of work, not after
    executor = config.executor(cfg)
    generator = config.instantiate(cfg.diffusion, device=executor.places(config.device(cfg))[0])
    if calibration is not None:
        check_calibration(calibration, generator.identity())
    if cfg.stage == "all" and config.labeler_kind(cfg) == "attention":
        config.check_source(cfg, generator, taxonomy)
    done = synthesize(
        cfg.folder,
        Makers(generator, clip, executor, config.worker_build(cfg, clip)),
        config.instantiate(cfg.prompts),
        taxonomy,
        config.synthesis_settings(cfg, generator, taxonomy),
        config.chosen_on(cfg, "diffusion"),
        config.prompts_sha256(cfg),
    )
    for line in _told(cfg.folder, done):
        print(line)
    return done["complete"]


def _told(folder: str, done: dict[str, Any]) -> list[str]:
    lines = [
        f"{done['images']} images in {folder}, {done['made_now']} made now in "
        f"{done['seconds']:.0f} s"
    ]
    if done["drawn_again"] or done["failed"]:
        lines.append(
            f"bad images: {done['drawn_again']} drawn again, {done['failed']} left out "
            "(faults in records/)"
        )
    if done["quarantined"]:
        lines.append(
            f"{done['quarantined']} samples of units that failed are left out (errors in "
            "records/); try again"
        )
    if not done["complete"]:
        lines.append(
            f"the rest of the {done['planned']} images is the work of other shards: the last one "
            "makes the masks"
        )
    return lines


def make_masks(cfg: Any, quality: Quality | None = None) -> None:
    kind = config.labeler_kind(cfg)
    if kind == "model":
        name = cfg.mask_set or config.own_mask_set(cfg)
        chosen = config.chosen_on(cfg, "labeler")
        masks = label_images(cfg.folder, config.labeler(cfg), name, cfg.heat, chosen)
    elif kind == "run":
        if cfg.heat is not None:
            raise ValueError(
                f"heat={cfg.heat} has no effect with labeler.run={cfg.labeler.run}, which sees the "
                "images and no heat; give one of them"
            )
        masks = label_by_run(cfg.folder, *config.labeler_run(cfg))
    else:
        calibration = config.masks_from(cfg)
        settings, (rules, clip) = config.instantiate(cfg.masks), quality or config.quality(cfg)
        if cfg.heat is not None and any(r.action == "absent" for r in rules):
            raise ValueError(
                f"heat={cfg.heat} and rules of quality with action absent: these use the heat "
                "of the drawing. Leave heat or the rules out (quality.rules.<name>=null)"
            )
        absent = find_absent(cfg.folder, rules, settings, clip, cfg.quality.max_share)
        chosen = config.chosen_on(cfg, "masks", *(["quality"] if rules else []))
        given = {"chosen_on": chosen, "reading": cfg.heat}
        masks = label(cfg.folder, settings, cfg.mask_set, calibration, absent, **given)
    print(f"masks in {masks}")


def read_images(cfg: Any) -> None:
    calibration, reader = config.masks_from(cfg), config.heat_reader(cfg)
    if calibration is not None:
        check_calibration(calibration, reader.generator.identity())
    done = read_heat(cfg.folder, reader)
    print(
        f"heat of {done['read']} images in {cfg.folder}/heat/{reader.name}, {done['read_now']} "
        f"read now in {done['seconds']:.0f} s; stage=label heat={reader.name} makes masks"
    )
    if not done["complete"]:
        print(
            f"{done['planned'] - done['read']} images are left: of other shards, or of units "
            "that failed"
        )


def make_list(cfg: Any, quality: Quality | None = None) -> None:
    rules, clip = quality or config.quality(cfg)
    how = (cfg.quality.split, clip, cfg.quality.max_share, config.chosen_on(cfg, "quality"))
    print_counts(filter_samples(cfg.folder, rules, cfg.mask_set, *how))
    trains = spelled(f"train.py synthetic_split={cfg.quality.split} trains on them")
    print(f"{trains}; reasons in {cfg.folder}/quality")


def only_images(cfg: Any) -> None:
    make_images(cfg)


DOOR = Door(
    "generate",
    "Make or change synthetic data: prompts -> images, heat maps and masks.",
    {
        "all": Stage(make_all, "images, heat maps and masks, and what is left of them by rules"),
        "caption": Stage(make_captions, "captions of unlabelled photographs, for prompts"),
        "synthesize": Stage(only_images, "images and heat maps alone"),
        "read": Stage(read_images, "heat of finished images, by the model of diffusion=..."),
        "label": Stage(
            make_masks,
            "masks: from stored heat, by a trained run, a foundation model, ... (labeler=)",
        ),
        "filter": Stage(make_list, "a list of the samples that the rules of quality keep"),
    },
    (
        "python generate.py experiment=shapes num_images=32",
        "python generate.py experiment=shapes stage=label mask_set=paper masks=paper",
        "python generate.py experiment=voc diffusion.model=<folder or hub id>",
    ),
)
