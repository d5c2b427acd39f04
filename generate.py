"""Prompts -> images, heat maps and masks.   python generate.py experiment=shapes"""

from dd import config
from dd.stages.calibrate import calibrate
from dd.stages.caption import caption
from dd.stages.filter import filter_samples, find_absent, print_counts
from dd.stages.label import check_calibration, label
from dd.stages.predict import predict
from dd.stages.probe import probe
from dd.stages.sweep import print_best, sweep
from dd.stages.synthesize import synthesize

STAGES = ("caption", "all", "synthesize", "label", "probe", "sweep", "calibrate", "filter")


def run(cfg) -> float | None:
    if cfg.stage not in STAGES:
        raise ValueError(f"stage={cfg.stage!r}; allowed: {', '.join(STAGES)}")
    if cfg.stage == "caption":
        captioner = config.instantiate(cfg.captioner, device=config.device(cfg))
        done = caption(cfg.caption.folder, captioner, cfg.caption.images, cfg.caption.batch_size)
        lost = (
            f"; {len(done['unreadable'])} images cannot be read (unreadable.txt there)"
            if done["unreadable"]
            else ""
        )
        print(
            f"{done['captions']} captions in {cfg.caption.folder}/captions.jsonl, "
            f"{done['made_now']} made now{lost}"
        )
        return None
    calibration = config.masks_from(cfg)
    masks, taxonomy = config.instantiate(cfg.masks), config.taxonomy(cfg)
    rules, clip = config.quality(cfg)
    if cfg.stage in ("all", "synthesize"):
        executor = config.executor(cfg)
        generator = config.instantiate(cfg.diffusion, device=executor.places(config.device(cfg))[0])
        if calibration is not None:
            check_calibration(calibration, generator.identity())
        prompts, unit_size = (
            config.instantiate(cfg.prompts),
            config.unit_size(cfg, generator, taxonomy),
        )
        done = synthesize(
            cfg.folder,
            generator,
            prompts,
            taxonomy,
            cfg.num_images,
            cfg.seed,
            unit_size,
            cfg.image_format,
            cfg.prompts_over_limit,
            cfg.redraw,
            clip,
            executor,
            config.worker_build(cfg, clip),
            config.chosen_on(cfg, "diffusion"),
            config.prompts_sha256(cfg),
        )
        print(
            f"{done['images']} images in {cfg.folder}, {done['made_now']} made now in "
            f"{done['seconds']:.0f} s"
        )
        if done["drawn_again"] or done["failed"]:
            print(
                f"bad images: {done['drawn_again']} drawn again, {done['failed']} left out "
                "(faults in records/)"
            )
        if done["quarantined"]:
            print(
                f"{done['quarantined']} samples of units that failed are left out (errors in "
                "records/); try again"
            )
        if not done["complete"]:
            print(
                f"the rest of the {done['planned']} images is the work of other shards: the last "
                "one makes the masks"
            )
            return None
    if cfg.stage in ("all", "label"):
        absent = find_absent(cfg.folder, rules, masks, clip, cfg.quality.max_share)
        chosen = config.chosen_on(cfg, "masks", *(["quality"] if rules else []))
        made = label(cfg.folder, masks, cfg.mask_set, calibration, absent, chosen_on=chosen)
        print(f"masks in {made}")
    if cfg.stage == "filter" or (cfg.stage == "all" and any(r.action == "drop" for r in rules)):
        chosen = config.chosen_on(cfg, "quality")
        how = (cfg.quality.split, clip, cfg.quality.max_share, chosen)
        result = filter_samples(cfg.folder, rules, cfg.mask_set, *how)
        print_counts(result)
        print(
            f"train.py synthetic_split={cfg.quality.split} trains on them; reasons in "
            f"{cfg.folder}/quality"
        )
    if cfg.stage == "probe":
        generator = config.instantiate(cfg.diffusion, device=config.device(cfg))
        data = config.real_data(cfg, cfg.probe.split)
        append = cfg.prompts.append
        what = f"{cfg.data.name}_{cfg.probe.split}" + ("" if append else "_append=off")
        path = f"{cfg.output_root}/{cfg.name}/probe_{what}.json"
        result = probe(path, generator, data, masks, cfg.probe.timesteps, append, cfg.probe.limit)
        print(
            f"mask mIoU on {result['num_images']} noised real images of {cfg.probe.split}: "
            f"{result['miou']:.2f} ({path})"
        )
        print(
            "with", ", ".join(f"{name} {value:.2f}" for name, value in result["ablations"].items())
        )
        return result["miou"]
    if cfg.stage == "sweep":
        arguments = config.sweep_arguments(cfg)
        if cfg.sweep.run is not None:
            how = {"limit": cfg.sweep.limit, "device": config.device(cfg)}
            arguments["reference"] = predict(cfg.folder, *config.trained_run(cfg.sweep.run), **how)
        result = sweep(cfg.folder, **arguments)
        print_best(result)
        print(
            f"all in {cfg.folder}/sweeps/{arguments['name']}.json; masks_from=... makes masks "
            "with the best"
        )
        return result["sweep"]["table"][0]["miou"]
    if cfg.stage == "calibrate":
        path, arguments = config.calibrate_arguments(cfg)
        result = calibrate(path, **arguments)
        found = result["calibration"]
        print(
            f"{result['masks']} fit {found['shots']} labelled images best: mIoU "
            f"{found['miou']:.2f} (masks_from={path})"
        )
        return found["miou"]


if __name__ == "__main__":
    config.main("generate", run)
