"""The stages for Python: ``import dd``. Plain values in, arrays with names out.

Each verb composes the settings that its command would compose and calls the same stage; what is
written is what the command writes. torch and Hydra are imported when a verb is called.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from dd.store.commands import called
from dd.store.provenance import quoted, read_own, write_atomic
from dd.taxonomy import (
    BACKGROUND,
    TAXONOMIES,
    Taxonomy,
    read_taxonomy,
    taxonomy,
    taxonomy_yaml,
    voc_palette,
)

Classes = str | Path | Sequence[str] | Mapping[str, Sequence[str]]
Prompts = Sequence[str] | Mapping[str, Sequence[str]]
Picture = Image.Image | np.ndarray | str | Path
TAXONOMY = "taxonomy.yaml"  # of a set that was made here
SMALL = 256  # pixels: a set of images of at most this side has the recipe of the embedded world
OF_DRAWING = "class_prompt"  # the heat that masks are made of


@dataclass(frozen=True, eq=False)
class Shown:
    """An image uint8 [H, W, 3] as ``image`` (Pillow) with its ``mask``, uint8 [H, W]: the position
    of a class in ``classes``, which begin with background; 255 = uncertain."""

    image: Image.Image = field(repr=False)
    mask: np.ndarray = field(repr=False)
    classes: tuple[str, ...]

    @property
    def overlay(self) -> Image.Image:
        """The image with its mask over it, in the colours of PASCAL VOC."""
        from dd.report.pictures import overlay

        return Image.fromarray(overlay(np.asarray(self.image), self.mask, voc_palette()))

    @property
    def shares(self) -> dict[str, float]:
        """The part of the pixels, 0 to 1, that each class has; uncertain ones have none."""
        counts = np.bincount(self.mask.ravel(), minlength=256)
        return {name: float(counts[i] / self.mask.size) for i, name in enumerate(self.classes)}

    @cached_property
    def picture(self) -> Image.Image:
        """What :meth:`show` shows: the image and the mask over it."""
        return _beside([self.image, self.overlay])

    def show(self) -> None:
        """Show :attr:`picture`: in a notebook below the cell, elsewhere in a window."""
        if "IPython" in sys.modules and (display := _notebook()):
            display(self.picture)
        else:
            self.picture.show()

    def _repr_png_(self) -> bytes | None:
        return self.picture._repr_png_()


@dataclass(frozen=True, eq=False)
class Drawn(Shown):
    """An image that a generator drew. ``heat`` {class of the prompt: float64 [powers, r, r]}: its
    attention to that class, refined by 0, 1, ... applications of the self-attention. ``prompt``
    with the class words that were appended to it; ``id`` and ``seed`` in its set."""

    heat: dict[str, np.ndarray] = field(repr=False)
    prompt: str
    id: str
    seed: int

    @cached_property
    def picture(self) -> Image.Image:
        """The image, the highest power of each class's heat, and the mask over the image."""
        from dd.report.pictures import heat

        pixels = np.asarray(self.image)
        maps = [Image.fromarray(heat(pixels, maps[-1])) for maps in self.heat.values()]
        return _beside([self.image, *maps, self.overlay])


class Drawings(Sequence[Drawn]):
    """A synthetic data set, in the order of its plan; each image is read when it is asked for.

    ``folder`` is in PASCAL VOC layout (docs/formats.md), ``left_out`` are the prompts whose image
    stayed bad however often it was drawn. ``masks``: the mask set, such as ``masks/paper``.
    FileNotFoundError or ValueError for a folder that is no synthetic set.
    """

    def __init__(self, folder: str | Path, masks: str = "SegmentationClass") -> None:
        from dd.store.samples import read_plan, read_whole_plan

        self.folder, self.masks = Path(folder), masks
        self.samples = read_plan(folder)
        good = {sample.id for sample in self.samples}
        self.left_out = [s.prompt for s in read_whole_plan(folder) if s.id not in good]
        names = read_own(self.folder / "run.json", {"identity": dict})["identity"]["taxonomy"]
        self.classes = (BACKGROUND, *names["names"])
        self._lent: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Drawn: ...
    @overload
    def __getitem__(self, index: slice) -> list[Drawn]: ...
    def __getitem__(self, index: int | slice) -> Drawn | list[Drawn]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        from dd.data.datasets import read_image, read_mask, stored_heat, synthetic_image

        sample = self.samples[index]
        stored = stored_heat(self.folder, sample.id)
        maps = stored[OF_DRAWING] if OF_DRAWING in stored else next(iter(stored.values()))
        return Drawn(
            image=Image.fromarray(read_image(synthetic_image(self.folder, sample.id))),
            mask=read_mask(self.folder / self.masks / f"{sample.id}.png"),
            classes=self.classes,
            heat=dict(zip(sample.classes, maps, strict=True)),
            prompt=sample.prompt,
            id=sample.id,
            seed=sample.seed,
        )

    def __repr__(self) -> str:
        return f"<{len(self)} drawings of {', '.join(self.classes[1:])} in {self.folder}>"


@dataclass(frozen=True)
class Run:
    """A trained segmenter: the folder of its run, as ``python train.py`` writes it."""

    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """run.json: settings, versions, what it was trained on, the labels behind it."""
        file = self.folder / "run.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{self.folder}: no finished training run there (a folder with run.json)"
            )
        return read_own(file, {})

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in mask order, background first."""
        return (BACKGROUND, *self.record["taxonomy"]["names"])


@dataclass(frozen=True, eq=False)
class Scores:
    """mIoU of a run in percent. ``iou`` {class: percent, None for one that is neither there nor
    seen}; ``confusion`` int64 [classes, classes], true class by predicted class, in pixels;
    ``file``: metrics.json with everything else."""

    miou: float
    iou: dict[str, float | None] = field(repr=False)
    pixel_accuracy: float
    num_images: int
    confusion: np.ndarray = field(repr=False)
    file: Path = field(repr=False)


def generate(
    prompts: Prompts,
    classes: Classes,
    generator: str = "embedded",
    *,
    to: str | Path | None = None,
    seed: int = 0,
    number: int | None = None,
    model: str | None = None,
    steps: int | None = None,
    masks: str = "refined",
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> Drawings:
    """Draw images and read masks of ``classes`` from the generator's attention: one for each
    prompt, or ``number`` of them, the prompts round and round.

    ``prompts``: texts, in which names, synonyms and plurals of the classes are found, or {text: its
    classes}. ``classes``: names in mask order, {name: synonyms}, or voc, coco, shapes, or a YAML
    file (docs/data.md). ``generator``, ``masks``: a file of conf/diffusion and conf/masks;
    ``model``: the folder or hub id of its weights; ``steps`` of its sampling; ``settings``: any
    other keys of ``generate.py``, as {"diffusion.guidance": 5}.

    ``to``: the folder of the set. It is kept, and the same call goes on where it stopped; None = a
    temporary one, which goes with what is returned. ValueError for a prompt that names no class;
    FileExistsError for a folder made with other settings.
    """
    arguments = dict(locals())
    words = _words(classes)
    rows = _rows(prompts, words)
    from dd import config
    from dd.cli.generate import make_all

    lent = None if to is not None else tempfile.TemporaryDirectory(prefix="drawings-")
    folder = Path(lent.name) / "set" if lent else Path(str(to))
    with _call("generate", arguments), tempfile.TemporaryDirectory() as place:
        path = Path(place, "prompts.jsonl")
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        source = {"_target_": "dd.prompts.captions.CaptionFile", "path": str(path)}
        values = {
            "diffusion": generator,
            "masks": masks,
            "data": "own",
            "data.name": Path(to).name if to is not None else "drawings",
            "data.taxonomy": str(folder / TAXONOMY),
            "folder": str(folder),
            "prompts": {**source, "append": True, "in_order": True},
            "seed": seed,
            "num_images": number,
            "unit_size": 4,
            "image_format": "png",
            "device": device,
            **({} if model is None else {"diffusion.model": model}),
            **({} if steps is None else {"diffusion.steps": steps}),
            **(settings or {}),
        }
        cfg = config.composed("generate", values)
        _write_taxonomy(folder, words)
        make_all(cfg)
    made = Drawings(folder)
    made._lent = lent
    return made


def train(
    data: Drawings | str | Path,
    to: str | Path,
    *,
    steps: int | None = None,
    recipe: str | None = None,
    start: Run | str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    classes: Classes | None = None,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Train a segmenter on a set: a synthetic one, or labelled images in VOC layout.

    ``to``: the folder of the run; the same call goes on where it stopped, and a finished one is
    returned as it is. ``recipe``: an experiment of ``train.py`` for all that is not given here;
    None = ``shapes_synthetic`` for images of at most 256 px, which starts without weights from
    elsewhere, else ``paper_synthetic``. ``start``: a run to go on from; ``shots``: of labelled
    images, so many of them; ``classes``: of a set that does not tell them by a taxonomy.yaml or a
    known name; ``settings``: any other keys, as {"scale": 128}.
    """
    arguments = dict(locals())
    folder, to = Path(data.folder if isinstance(data, Drawings) else data), Path(to)
    synthetic = (folder / "plan.jsonl").is_file()
    from dd import config
    from dd.cli.train import make_segmenter

    given: dict[str, Any] = {
        "trainer.max_steps": steps,
        "init_from": None if start is None else str(_folder(start)),
        "shots": shots,
        "optimizer.learning_rate": learning_rate,
        "batch_size": batch_size,
    }
    values = {
        "experiment": recipe or _recipe(folder),
        "data": "own",
        "data.name": folder.name,
        "data.root": str(folder),
        "data.taxonomy": _known_taxonomy(folder, classes),
        "name": to.name,
        "output_root": str(to.parent),
        "source": "synthetic" if synthetic else "real",
        **({"synthetic": str(folder)} if synthetic else {}),
        "seed": seed,
        "device": device,
        **{k: v for k, v in given.items() if v is not None},
        **(settings or {}),
    }
    with _call("train", arguments):
        make_segmenter(config.composed("train", values))
    return Run(to)


def score(
    run: Run | str | Path,
    data: str | Path,
    split: str = "test",
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 16,
    device: str = "auto",
) -> Scores:
    """mIoU of a run on a split of labelled images in VOC layout, whose classes are the run's. The
    result lies in the run's folder, and reports find it there; a split that was scored is not
    scored again. ``scales``, ``flip``: test-time augmentation."""
    from dd.cli.evaluate import score_run
    from dd.data.datasets import SegmentationFolder
    from dd.stages.score import ScoreSettings

    folder, name = _folder(run), Path(data).name
    words = Taxonomy("run", Run(folder).classes[1:])
    images = SegmentationFolder(data, split, words)
    how = ScoreSettings(batch_size=batch_size, device=_device(device))
    place = f"eval/{name}" + ("" if split == "test" else f"-{split}")
    views = (False, "ema", list(scales), flip)
    path, _, found = score_run(folder, place, images, views, how)
    return Scores(
        miou=found["miou"],
        iou=found["iou"],
        pixel_accuracy=found["pixel_accuracy"],
        num_images=found["num_images"],
        confusion=np.asarray(found["confusion"], np.int64),
        file=path,
    )


def predict(run: Run | str | Path, image: Picture, *, device: str = "auto") -> Shown:
    """What a run sees in an image: a Pillow image, an array uint8 [H, W, 3], or a file. The run
    stays in memory for the next image."""
    folder = _folder(run)
    pixels = _pixels(image)
    predictor = _predictor(folder.absolute(), _device(device), _when(folder / "run.json"))
    [mask] = predictor([pixels])
    return Shown(Image.fromarray(pixels), mask, Run(folder).classes)


# ------------------------------------------------------------------------------------------ helpers


def _words(classes: Classes) -> Taxonomy:
    """The classes as given, in mask order."""
    if isinstance(classes, Path):
        return read_taxonomy(classes)
    if isinstance(classes, str):
        return taxonomy(classes)
    synonyms = {k: tuple(v) for k, v in classes.items()} if isinstance(classes, Mapping) else {}
    return Taxonomy("own", tuple(classes), {k: v for k, v in synonyms.items() if v})


def _rows(prompts: Prompts, words: Taxonomy) -> list[dict[str, Any]]:
    """Entries of a caption file: each prompt with its classes."""
    from dd.prompts.nouns import ClassNouns

    if isinstance(prompts, str):
        raise ValueError(
            f"prompts={prompts!r:.200}: expected a list of texts, as [{prompts!r:.50}]"
        )
    if isinstance(prompts, Mapping):
        found = {text: list(names) for text, names in prompts.items()}
        rows = [{"caption": text, "classes": names} for text, names in found.items()]
    else:
        nouns = ClassNouns(words)
        rows = [{"caption": text, "classes": list(nouns.find(text))} for text in prompts]
    if not rows:
        raise ValueError("prompts is empty: expected at least one text")
    for row in rows:
        words.ids(row["classes"])
        if not row["classes"]:
            raise ValueError(
                f"the prompt {row['caption']!r:.200} names none of the classes "
                f"{', '.join(words.names)}: name one in it, give synonyms as classes={{name: "
                "[...]}, or say which are meant as prompts={text: [classes]}"
            )
    return rows


def _write_taxonomy(folder: Path, words: Taxonomy) -> None:
    """The file in a set that names its classes, if it is not there. FileExistsError if the set has
    others."""
    path, text = folder / TAXONOMY, taxonomy_yaml(words)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{folder} was made for other classes ({path}); nothing was changed. Choose another "
            "folder, or remove it to make it anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_atomic(path, text)


def _known_taxonomy(folder: Path, classes: Classes | None) -> str:
    """What ``data.taxonomy`` is for a set: its own file, or a known name. ValueError where neither
    tells its classes."""
    if isinstance(classes, str | Path):
        return str(classes)
    if (folder / TAXONOMY).is_file() and classes is None:
        return str(folder / TAXONOMY)
    names = _recorded_names(folder) if classes is None else list(_words(classes).names)
    for known in TAXONOMIES.values():
        if names == list(known.names):
            return known.name
    raise ValueError(
        f"{folder} does not tell its classes: give classes=voc, coco, shapes or a YAML file "
        "(docs/data.md)"
    )


def _recorded_names(folder: Path) -> list[str] | None:
    """The class names that a set's own record has; None where it has no record."""
    for file, keys in (("run.json", ("identity", "taxonomy")), ("dataset.json", ("taxonomy",))):
        if (folder / file).is_file():
            found: Any = read_own(folder / file, {})
            if "domain" in found.get("identity", {}):  # of the embedded world
                return list(TAXONOMIES["shapes"].names)
            for key in (*keys, "names"):
                found = found.get(key) if isinstance(found, dict) else None
            if found:
                return list(found)
    return None


def _recipe(folder: Path) -> str:
    from dd.data.datasets import image_folders, image_size

    places = [place for place in image_folders(folder) if place.is_dir()]
    first = next((file for place in places for file in sorted(place.iterdir())), None)
    if first is None:
        raise FileNotFoundError(f"{folder} is no data set: no image in {folder}/JPEGImages")
    return "shapes_synthetic" if max(image_size(first)) <= SMALL else "paper_synthetic"


def _folder(run: Run | str | Path) -> Path:
    return run.folder if isinstance(run, Run) else Path(run)


def _device(device: str) -> str:
    import torch

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return auto if device == "auto" else device


def _when(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


@lru_cache(maxsize=1)
def _predictor(folder: Path, device: str, _when: int) -> Any:
    from dd import config
    from dd.training.segmentation import Predictor

    return Predictor(*config.trained_run(folder), device)


def _pixels(image: Picture) -> np.ndarray:
    """uint8 [H, W, 3]. ValueError for another array, or what is no image."""
    if isinstance(image, str | Path):
        from dd.data.photos import read_photo

        return read_photo(Path(image))
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image


def _beside(pictures: Sequence[Image.Image], gap: int = 4, least: int = 256) -> Image.Image:
    """Pictures of one size in a row, each at least ``least`` pixels high."""
    times = max(1, round(least / pictures[0].height))
    width, height = (times * side for side in pictures[0].size)
    row = Image.new("RGB", (len(pictures) * (width + gap) - gap, height), "white")
    for i, picture in enumerate(pictures):
        row.paste(picture.resize((width, height), Image.Resampling.NEAREST), (i * (width + gap), 0))
    return row


def _notebook() -> Any:
    """``display`` of a notebook, None outside one."""
    from IPython import get_ipython
    from IPython.display import display

    return display if get_ipython() is not None else None


@contextmanager
def _call(verb: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Results are recorded as made by this call, lists and mappings by their size."""

    def told(value: Any) -> str:
        place = value.folder if isinstance(value, Drawings | Run) else value
        return quoted(str(place) if isinstance(place, Path) else place)

    shown = ", ".join(f"{k}={told(v)}" for k, v in arguments.items() if v is not None)
    with called(f"dd.{verb}({shown})"):
        yield
