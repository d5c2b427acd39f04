"""The arguments of generate.py: executors, mask settings from a file, quality rules, sweeps and
calibration."""

import itertools
import re
import sys
from collections.abc import Callable
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dd.config.objects import chosen_on, device, instantiate, plain, taxonomy, trained_run
from dd.data.datasets import SegmentationFolder, choose_source
from dd.data.quality import CLIP, Rule, Scores, read_rules
from dd.evaluation.supervision import choices
from dd.execution import Executor
from dd.execution.units import Tools, read_run
from dd.masks.chain import CHAINS
from dd.masks.from_heat import READING, MaskSettings
from dd.prompts.prompt import make_prompt
from dd.stages.calibrate import CalibrationSettings
from dd.stages.label import DEFAULT_SET
from dd.stages.label_by_run import LabelerSettings, Teacher
from dd.stages.read_heat import Reader
from dd.stages.sweep import SweepSettings
from dd.stages.synthesize import SynthesisSettings
from dd.store.provenance import fingerprint, read_json, read_yaml, sha256
from dd.store.samples import Sample, make_plan
from dd.taxonomy import Taxonomy

if TYPE_CHECKING:  # heavy imports
    from dd.generators.base import Generator
    from dd.labelers.base import Labeler


TAUGHT = "self_training"  # the mask set of labeler.run if the command names none


def executor(cfg: DictConfig) -> Executor:
    """Who makes the units. Its number of threads also applies to this process, since it is part of
    the identity."""
    chosen = instantiate(cfg.executor)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    return chosen


def worker_tools(
    diffusion: dict[str, Any], clip: dict[str, Any] | None, threads: int, device: str
) -> Tools:
    """(generator, CLIP model or None) of a worker process, with the numerical settings of the
    driver's process."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    scores = None if clip is None else instantiate(clip, device=device)
    return instantiate(diffusion, device=device), scores


def worker_build(cfg: DictConfig, clip: Scores | None) -> Callable[..., Tools]:
    """``build(device)`` of the stage synthesize: what a worker process needs, as plain values."""
    model = None if clip is None else plain(cfg.quality)["clip"]
    return partial(worker_tools, plain(cfg.diffusion), model, torch.get_num_threads())


def heat_reader(cfg: DictConfig) -> Reader:
    """The settings of the stage read: the model of ``diffusion``, reading after drawing."""
    name = cfg.reader
    if name is None and HydraConfig.initialized():
        name = HydraConfig.get().runtime.choices["diffusion"]
    if name is None:
        raise ValueError("reader is not set: the name of the reading, such as reader=sd21")
    if given := [a for a in sys.argv[1:] if re.match(r"\+*diffusion\.reading=", a)]:
        raise ValueError(
            f"{given[0]} has no effect with stage=read, which reads after drawing; leave it out"
        )
    workers = executor(cfg)
    model = {**plain(cfg.diffusion), "reading": "after"}
    generator = instantiate(model, device=workers.places(device(cfg))[0])
    build = partial(worker_tools, model, None, torch.get_num_threads())
    return Reader(name, generator, workers, build, chosen_on(cfg, "diffusion"))


def masks_from(cfg: DictConfig) -> dict[str, Any] | None:
    """Apply the settings of ``masks_from``, a file of stage=calibrate or stage=sweep, to ``cfg``:
    those of the masks, how the attention is read, and the labels they were chosen on. Returns the
    record of this choice for a mask set; None if there is no file.

    FileNotFoundError, or ValueError for another content (only numbers and names are read from it),
    for a stage that makes its own choice, and for an override that contradicts the file.
    """
    if cfg.masks_from is None:
        return None
    path = Path(cfg.masks_from)
    if cfg.stage in ("sweep", "calibrate"):
        raise ValueError(
            f"masks_from has no effect with stage={cfg.stage}, which tries settings of its own"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"masks_from={path}: no such file; stage=calibrate and stage=sweep print the path of "
            "theirs"
        )
    decided = re.compile(rf"masks[.=]|diffusion\.({'|'.join(READING)})=")
    if given := [a for a in sys.argv[1:] if decided.match(a)]:
        raise ValueError(
            f"masks_from={path} and {', '.join(given)} contradict each other; give one of them"
        )
    try:
        content = read_json(path) if path.suffix == ".json" else read_yaml(path)
        masks, reading, calibration = _choice(content)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"masks_from={path} is not a file of stage=calibrate or stage=sweep: {error!r:.300}"
        ) from None
    # replace the whole group, because its chain may differ from the file's
    own = {"_target_": cfg.masks["_target_"], **masks}
    OmegaConf.update(cfg, "masks", own, merge=False, force_add=True)
    cfg.diffusion.update(reading)
    # The record of the masks is replaced too. That of diffusion stays, because the file may have
    # kept its reading.
    how: dict[str, Any] = {"merge": False, "force_add": True}
    OmegaConf.update(cfg, "masks.chosen_on", content["chosen_on"], **how)
    return calibration


def _choice(content: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(masks, reading of the attention, how they were chosen) of a file for ``masks_from``; raises
    some error for other content."""
    masks, reading = content["masks"], content["diffusion"]
    values = [v for value in reading.values() for v in (value if type(value) is list else [value])]
    chosen = MaskSettings(**masks)
    typed = chosen.identity().keys() == masks.keys() and all(
        v is None or type(v) in (int, bool) or (type(v) is str and re.fullmatch(r"[\w. -]+", v))
        for v in values
    )
    if not typed or not reading.keys() <= set(READING):
        raise ValueError(f"masks hold {masks}, diffusion holds {reading}")
    masks = {**masks, "steps": [step.plain() for step in chosen.steps]}
    choices("masks", content["chosen_on"])
    calibration = content["calibration"]
    return masks, reading, {**calibration, "generator": dict(calibration["generator"])}


def synthesis_settings(
    cfg: DictConfig, generator: "Generator", taxonomy: Taxonomy
) -> SynthesisSettings:
    """The settings of the stage synthesize."""
    keys = ("num_images", "seed", "image_format", "prompts_over_limit", "redraw")
    given = {key: cfg[key] for key in keys}
    return SynthesisSettings(**given, unit_size=unit_size(cfg, generator, taxonomy))


def _any_sample(cfg: DictConfig, taxonomy: Taxonomy) -> Sample:
    name, append = taxonomy.names[0], OmegaConf.select(cfg, "prompts.append", default=True)
    prompt = make_prompt(f"a photo of a {name}", [name], append)
    return make_plan([prompt], taxonomy, cfg.seed, 1)[0]


def check_source(cfg: DictConfig, generator: "Generator", taxonomy: Taxonomy) -> None:
    """ValueError if masks would be read from words that the generator does not store."""
    stored = generator.spans(_any_sample(cfg, taxonomy))
    choose_source(dict.fromkeys(stored, np.zeros(0)), cfg.masks.source, "what will be drawn")


def unit_size(cfg: DictConfig, generator: "Generator", taxonomy: Taxonomy) -> int:
    """How many samples are generated together. ``auto``: as many as fit into memory, or the size
    that the set was begun with."""
    if type(cfg.unit_size) is int:
        return cfg.unit_size
    if (Path(cfg.folder) / "run.json").is_file():
        return read_run(cfg.folder)["identity"]["unit_size"]
    found = generator.largest_batch(_any_sample(cfg, taxonomy))
    print(f"unit_size=auto: {found} images at a time fit into memory")
    return found


def quality(cfg: DictConfig) -> tuple[list[Rule], Scores | None]:
    """(rules, CLIP model or None) of the quality group for the stages that use them; ([], None) for
    the others."""
    if cfg.stage not in ("all", "synthesize", "label", "filter"):
        return [], None
    rules, model = read_rules(plain(cfg.quality)["rules"]), cfg.quality.clip.model
    if cfg.stage == "filter" and not any(r.action == "drop" for r in rules):
        raise ValueError(
            "stage=filter needs a rule of action drop, such as "
            "+quality.rules.uncertain='{action: drop, signal: uncertain, above: 0.5}' "
            "(docs/quality.md)"
        )
    if cfg.stage == "all" and model is None and any(r.signal in CLIP for r in rules):
        raise ValueError(
            "a rule of quality reads CLIP scores: give quality.clip.model=<folder, or hub id with "
            "a revision>"
        )
    return rules, None if model is None else instantiate(cfg.quality.clip, device=device(cfg))


def labeler_kind(cfg: DictConfig) -> str:
    """Who makes the masks: ``attention``, ``run``, or ``model`` for a node with a ``_target_``."""
    if "_target_" in cfg.labeler:
        return "model"
    taught = cfg.labeler.run is not None or cfg.labeler.get("kind") == "run"
    return "run" if taught else "attention"


def own_mask_set(cfg: DictConfig) -> str:
    """The mask set of a labeler if the command names none."""
    kind = labeler_kind(cfg)
    if kind == "model":
        return str(cfg.labeler._target_).split(".")[-2]
    return TAUGHT if kind == "run" else DEFAULT_SET


def labeler(cfg: DictConfig) -> "Labeler":
    """The labeler of a node, with its weights."""
    if cfg.heat is not None and "source" not in cfg.labeler:
        raise ValueError(
            f"heat={cfg.heat} has no effect with this labeler, which sees the images and no heat; "
            "leave it out"
        )
    return instantiate(cfg.labeler, device=device(cfg))


def labeler_run(cfg: DictConfig) -> tuple[Teacher, LabelerSettings]:
    """Arguments of the stage label for ``labeler.run`` except the folder. ValueError for several
    runs."""
    given, run = plain(cfg.labeler), cfg.labeler.run
    if run is None:
        raise ValueError("labeler=run needs labeler.run=<folder of a trained run>")
    folders = sorted(glob(str(run))) or [run]
    if len(folders) > 1:
        raise ValueError(
            f"labeler.run={run}: a mask set has one teacher, got {len(folders)} runs; "
            "name one of them"
        )
    views = given["trusted"], given["weights"], given["scales"], given["flip"]
    how = {k: given[k] for k in ("confidence", "weights", "batch_size", "num_workers")}
    settings = LabelerSettings(mask_set=cfg.mask_set or TAUGHT, **how)
    return Teacher(*trained_run(folders[0], *views), device(cfg)), settings


def sweep_arguments(cfg: DictConfig) -> tuple[Path, SweepSettings]:
    """(the masks to compare with, or the run whose predictions they are; the settings of the stage
    sweep)."""
    given = plain(cfg.sweep)
    masks, run = given.pop("masks"), given.pop("run")
    if (masks is None) == (run is None):
        raise ValueError(
            "stage=sweep compares masks with sweep.masks=<a folder of masks <id>.png> or with "
            f"what sweep.run=<a training run> predicts; give one of them, got sweep.masks={masks}, "
            f"sweep.run={run}"
        )
    reference = Path(masks or run)
    if reference.is_relative_to(cfg.output_root):
        inside = reference.relative_to(cfg.output_root)
    else:
        inside = Path(reference.name)
    given["chains"] = _chains(given["chains"])
    return reference, SweepSettings(**given | {"name": given["name"] or "_".join(inside.parts)})


def _chains(given: Any) -> Any:
    """The chains of ``sweep.chains``: ``all`` of the package, or those of a YAML file."""
    if not isinstance(given, str):
        return given
    path = CHAINS if given == "all" else Path(given)
    if not path.is_file():
        raise FileNotFoundError(
            f"sweep.chains={given}: no such file; give all, a YAML file {{name: [step, ...]}} like "
            f"{CHAINS}, or the names and steps themselves"
        )
    return read_yaml(path)


def calibrate_arguments(cfg: DictConfig) -> tuple[str, dict[str, Any]]:
    """(file of the choice, arguments of the stage calibrate): each reading of the attention builds
    its own generator."""
    given, grid = plain(cfg.calibrate), plain(cfg.sweep)
    own = given["data"] == cfg.data.root
    images = plain(cfg.data).get("images") if own else None
    which = given["shots"], cfg.seed, images
    data = SegmentationFolder(given["data"], given["split"], taxonomy(cfg), cfg.data.masks, *which)
    choices = [given.get(k) or [plain(cfg.diffusion)[k]] for k in READING]
    settings = CalibrationSettings(
        timesteps=given["timesteps"],
        seed=cfg.seed,
        band=cfg.masks.band,
        append=cfg.prompts.append,
        **{key: grid[key] for key in ("power", "threshold", "source")},
        chains=_chains(grid["chains"]),
    )
    name = f"calibration_{data.root.name}_{data.split}_{given['shots']}_seed{cfg.seed}.yaml"
    return f"{cfg.output_root}/{cfg.name}/{name}", {
        "make_generator": partial(instantiate, cfg.diffusion, device=device(cfg)),
        "readings": [dict(zip(READING, each, strict=True)) for each in itertools.product(*choices)],
        "data": data,
        "test_split": cfg.data.test_split,
        "settings": settings,
        "name": cfg.data.name if own else None,
    }


def prompts_sha256(cfg: DictConfig) -> str:
    """Hash of everything that prompts are drawn from: the settings of their source, the content of
    the files in these, and the vocabulary."""

    def content(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: content(v) for k, v in value.items()}
        if isinstance(value, list):
            return [content(v) for v in value]
        is_file = isinstance(value, str) and len(value) < 1000 and Path(value).is_file()
        return {"sha256": sha256(Path(value))} if is_file else value

    words = taxonomy(cfg)
    vocabulary = [list(words.names), {k: list(v) for k, v in words.synonyms.items()}]
    return fingerprint([content(plain(cfg.prompts)), cfg.prompts_over_limit, vocabulary])
