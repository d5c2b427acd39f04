"""The arguments of evaluate.py for predictions, reviews and its report."""

import re
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from dd.config.composition import settings_file
from dd.config.jobs import job_overrides
from dd.config.objects import device, palette, plain, taxonomy, trained_run
from dd.config.settings import Data
from dd.data.datasets import SegmentationFolder
from dd.data.photos import source, without
from dd.stages.review import ReviewSettings
from dd.store.provenance import SETTINGS, read_own, read_yaml, sha256
from dd.store.schemas import NAMED
from dd.taxonomy import BACKGROUND, IGNORE, Colour, Taxonomy, voc_palette
from dd.training.segmentation import Predictor


def use_own_data(cfg: Any) -> None:
    """If the command names no data (``data=``, or an experiment), take those that the runs were
    trained with, from their config.yaml, and their synthetic set. ValueError for runs of several
    data sets, or for a file without such settings."""
    typed = (
        {re.split("[=.]", o.lstrip("+~"))[0] for o in job_overrides()}
        if HydraConfig.initialized()
        else {"data"}
    )
    files = (
        [Path(folder, "config.yaml") for folder in sorted(glob(str(cfg.run)))] if cfg.run else []
    )
    found = (
        []
        if typed & {"data", "experiment"}
        else [_trained_with(cfg, f) for f in files if f.is_file()]
    )
    if not found:
        return
    data, synthetic = found[0]
    if any(other != data for other, _ in found):
        names = ", ".join(
            f"{d['name']} in {d['root']}" for d in {str(d): d for d, _ in found}.values()
        )
        raise ValueError(
            f"run={cfg.run}: these runs were trained with several data sets ({names}); choose "
            "one: data=..."
        )
    OmegaConf.update(cfg, "data", data, merge=False, force_add=True)
    if "synthetic" not in typed and synthetic is not None and all(s == synthetic for _, s in found):
        cfg.synthetic = synthetic
    if cfg.stage not in ("predict", "review"):
        print(f"data: {data['name']} in {data['root']}, those of the run; others: data=...")


def _trained_with(cfg: Any, file: Path) -> tuple[dict[str, Any], str | None]:
    """(data group, synthetic set) of a run's config.yaml, below the current ``data_root``."""
    try:
        saved = read_yaml(file)
        data, before = saved["data"], saved["data_root"]
        Data(**data)
        texts = [before, saved.get("synthetic"), *data.values()]
        if any("${" in str(text) for text in texts) or not data["name"]:
            raise ValueError("it refers to other settings")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} does not tell the data of a training ({error!s:.200}); give them: data=..."
        ) from None

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        inside = isinstance(value, str) and value.startswith(f"{before}/")
        return f"{cfg.data_root}{value.removeprefix(before)}" if inside else value

    synthetic = saved.get("synthetic")
    return {k: moved(v) for k, v in data.items()}, moved(synthetic) if isinstance(
        synthetic, str
    ) else None


def prediction_arguments(cfg: Any, place: Path | None = None) -> dict[str, Any]:
    """Arguments of the stage predict. By default the results go to the run's
    ``predictions/<name of images>``, those of other weights or views to a folder of their own.
    ``place``: another folder within the run."""
    if not cfg.run:
        raise ValueError(
            f"run=null: stage={cfg.stage} needs the folder of a trained run, such as "
            "run=outputs/shapes/real/seed=0"
        )
    run, segmenter, views = trained_run(
        cfg.run, cfg.trusted, cfg.weights, plain(cfg)["scales"], cfg.flip
    )
    images = source(cfg.images, cfg.predict.every, cfg.max_pixels)
    path = Path(cfg.images).resolve()
    how = [part for part in (cfg.weights if cfg.weights != "ema" else "", views.name) if part]
    place = place or Path("predictions", path.stem if path.is_file() else path.name)
    target = Path(cfg.output or Path(cfg.run, place.parent, "-".join([place.name, *how])))
    if path.is_dir() and target.resolve().is_relative_to(path):
        raise ValueError(
            f"output={target} lies in images={cfg.images}: its masks would be taken for images "
            "next time"
        )
    identity = {
        "weights_sha256": run["weights_sha256"],
        "weights": cfg.weights,
        "protocol": views.protocol,
        "classes": run["taxonomy"]["names"],
        "images": str(path),
    }
    return {
        "target": target,
        "source": images,
        "predictor": Predictor(run, segmenter, views, device(cfg)),
        "identity": identity,
        "names": [BACKGROUND, *run["taxonomy"]["names"]],
        "palette": palette(cfg, run),
        "batch_size": cfg.batch_size,
    }


def review_arguments(cfg: Any) -> dict[str, Any]:
    """Arguments of the stage review. By default the queue goes to the run's ``review/<name of
    images>-<order>``."""
    if not cfg.images or not Path(cfg.images).is_dir():
        raise FileNotFoundError(
            f"images={cfg.images}: stage=review needs a folder of photographs; for a video, "
            "extract frames"
        )
    queue = {k: v for k, v in plain(cfg.review).items() if k != "leave_out"}
    settings = ReviewSettings(**queue)
    name = f"{Path(cfg.images).resolve().name}-{settings.order}"
    name += f"-{cfg.seed}" if settings.order == "random" else ""
    given = prediction_arguments(cfg, Path("review", name))
    if cfg.review.leave_out:
        given["source"].items = without(given["source"].items, cfg.review.leave_out)
        given["identity"]["left_out"] = sha256(Path(cfg.review.leave_out))
    names, colours = given.pop("names")[1:], given.pop("palette")
    classes = Taxonomy(
        read_own(Path(cfg.run) / "run.json", NAMED)["taxonomy"]["name"],
        names,
        colours=_colours(names, colours),
    )
    return {**given, "classes": classes, "settings": settings, "seed": cfg.seed}


def _colours(names: list[str], palette: list[int]) -> dict[str | int, Colour]:
    """{class: colour} of colours that differ from VOC's, in the form of a taxonomy file."""

    def colour(of: list[int], i: int) -> Colour:
        return of[3 * i], of[3 * i + 1], of[3 * i + 2]

    places: dict[str | int, int] = {BACKGROUND: 0, IGNORE: IGNORE}
    places |= {name: i for i, name in enumerate(names, 1)}
    voc = voc_palette()
    return {
        key: colour(palette, i) for key, i in places.items() if colour(palette, i) != colour(voc, i)
    }


def report_arguments(cfg: Any) -> dict[str, Any]:
    """Arguments of the stage report, from an evaluate configuration; ``report.runs`` is a folder or
    a glob of folders."""
    from dd.evaluation.budget import Prices
    from dd.stages.report import Material  # imports charts, so only if needed

    pattern = str(cfg.report.runs or "")
    if Path(pattern).is_dir():  # its name may contain characters with a meaning in patterns
        pattern = escape(pattern)
    begun = _with(pattern, SETTINGS) if cfg.report.runs else []
    runs = sorted({*_with(pattern, "run.json"), *begun}) if cfg.report.runs else []
    if not any((folder / "run.json").is_file() for folder in runs):
        raise FileNotFoundError(
            f"report.runs={cfg.report.runs}: no finished training run below it (a folder with "
            "run.json)"
        )
    material = Material(
        runs=runs,
        tests=test_sets(cfg),
        synthetic=cfg.synthetic,
        taxonomy=taxonomy(cfg),
        domains=list(cfg.report.domains),
        masks=cfg.synthetic_masks,
        baseline=cfg.report.baseline,
        budgets=sorted(glob(f"{pattern}/**/budget.json", recursive=True)),
        missed=_missed(pattern, runs),
        accept=cfg.report.accept,
        prices=Prices(**plain(cfg.report.prices)),
    )
    title = f"Dataset Diffusion: {cfg.name}"
    return {"folder": f"{cfg.output_root}/{cfg.name}", "title": title, "given": material}


def _with(pattern: str, file: str) -> list[Path]:
    return [Path(p).parent for p in glob(f"{pattern}/**/{file}", recursive=True)]


def _missed(pattern: str, runs: list[Path]) -> list[Path]:
    """Finished trainings of segmenters beside ``runs``, in the last folder of a pattern that is not
    itself a pattern."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if has_magic(part)), None)
    if fixed is None or not Path(*parts[:fixed]).is_dir():
        return []
    there = set(_with(escape(str(Path(*parts[:fixed]))), "run.json")) - set(runs)
    return sorted(folder for folder in there if "trained_on" in read_own(folder / "run.json", {}))


def test_sets(cfg: Any) -> dict[str, SegmentationFolder]:
    """Test images of each of ``report.domains`` (names of the data group) that exist on this
    machine."""
    found = {}
    for domain in cfg.report.domains:
        file, node = settings_file(f"data/{domain}"), cfg.data
        if domain != cfg.data.name and file:
            node = OmegaConf.merge({"data_root": cfg.data_root}, OmegaConf.load(file))
        if Path(node.root).is_dir() and domain in (cfg.data.name, file and file.stem):
            images = plain(node).get("images")
            found[domain] = SegmentationFolder(
                node.root, node.test_split, taxonomy(cfg), node.masks, images=images
            )
    return found
