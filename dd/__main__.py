# PYTHON_ARGCOMPLETE_OK
"""``dataset-diffusion``, or ``python -m dd``: the commands that need no configuration, and the
root scripts under their names (``generate``, ``train``, ``evaluate``)."""

import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from dd.cli.completion import complete_setting
from dd.cli.deploy import deploy_run, run_options, show_page
from dd.cli.init import init, init_options
from dd.execution import CANNOT_WRITE, EXIT
from dd.stages import prepare_coco as coco
from dd.stages import prepare_voc as voc
from dd.stages.export import FORMATS, export
from dd.stages.list_runs import list_runs, print_runs
from dd.stages.merge import merge
from dd.stages.prepare_images import GivenImages, prepare_images
from dd.stages.prepare_own import OwnData, prepare_own
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.verify import print_problems, verify
from dd.store.commands import SCRIPTS, program, repeated, spelled
from dd.store.downloads import Archive
from dd.store.locks import Busy
from dd.store.provenance import shortened

Options = dict[str, dict[str, Any]]  # name: arguments of add_argument
Prepared = list[tuple[Path, list[str]]]  # (folder, warnings) of each data set that was made
Prepare = Callable[[Namespace], Prepared]
SEVERAL: dict[str, Any] = {"action": "append", "default": []}
WORKERS: Options = {
    "--workers": {
        "type": int,
        "help": "processes that make masks (default: one for each core, at most 8)",
    }
}
EXPORT_FOLDER = "a synthetic set, such as data/synthetic/shapes, or a folder in VOC layout"
OWN: Options = {
    "--taxonomy": {
        "required": True,
        "help": "YAML file of names, synonyms and colours, or voc, coco, shapes",
    },
    "--name": {"default": "own", "help": "folder below the root (default: own)"},
    "--images": {"help": "folder of images; never written to"},
    "--masks": {
        "help": "folder of masks with the images' stems: class ids (palette or grey PNG) or the "
        "taxonomy's colours"
    },
    **{
        f"--{what}-{end}": {
            "default": "",
            "help": f"what the stems of {what}s have more than the others, such as {one}",
        }
        for what, one in (("mask", "_mask or gt_"), ("image", "_leftImg8bit or image_"))
        for end in ("ending", "beginning")
    },
    "--coco": {
        "action": "append",
        "metavar": "[SPLIT=]JSON",
        "help": "COCO JSON, such as labelme, CVAT, Roboflow and Label Studio export; one for each "
        "split: train=a.json",
    },
    "--brushes-only": {
        "action": "store_true",
        "help": "with --label-studio: leave regions out that are no brush",
    },
    "--cvat": {
        "help": "what CVAT exports as Segmentation mask 1.1: the zip, or its unpacked folder "
        "(needs --images)"
    },
    "--label-studio": {
        "metavar": "JSON",
        "help": "what Label Studio exports as JSON, with brushes (needs --images)",
    },
    "--voc": {
        "help": "instead of these: a folder with JPEGImages, SegmentationClass and "
        "ImageSets/Segmentation"
    },
    "--split": {**SEVERAL, "metavar": "SPLIT=FILE", "help": "text file with one image a line"},
    "--share": {
        **SEVERAL,
        "metavar": "SPLIT=PART",
        "help": "part drawn by --seed; default val=0.2",
    },
    "--group": {
        "metavar": "REGEX|folder|CSV",
        "help": "all images of a group fall in one split: what a regular expression finds in their "
        "paths, as '(?P<camera>cam[0-9]+)', their folder, or the second column of a CSV file",
    },
    "--splits-of": {
        "metavar": "FOLDER",
        "help": "an earlier, smaller set: its images stay in their splits, new ones are shared out",
    },
    "--seed": {"type": int, "default": 0},
    "--map": {
        **SEVERAL,
        "metavar": "LABEL=CLASS",
        "help": "of an annotation, or value of a mask (11=ignore); CLASS may be ignore (255) or "
        "background",
    },
    "--crowds": {
        "choices": ["ignore", "objects"],
        "default": "ignore",
        "help": "what iscrowd=1 means (default: 255)",
    },
}
GIVEN: Options = {
    "images": {"metavar": "FOLDER", "help": "of images; never written to"},
    "--captions": {
        "required": True,
        "metavar": "FILE",
        "help": 'JSON lines of {"filename", "caption"}; classes are found among the nouns, or '
        'given as "classes"',
    },
    "--taxonomy": {
        "default": "voc",
        "help": "voc (default), coco, shapes, or a YAML file of names and synonyms",
    },
    "--name": {"default": "given", "help": "folder below <root>/synthetic (default: given)"},
    "--fit": {
        "choices": ["crop", "squash"],
        "help": "images that are not square or not of one size: their middle, or out of shape",
    },
    "--size": {"type": int, "help": "with --fit: their side in pixels"},
    "--seed": {"type": int, "default": 0},
}
SBD: Options = {
    "--sbd": {"help": "an existing copy of SBD: the folder with cls, train.txt and val.txt"}
}
COCO: Options = {
    "--splits": {"nargs": "+", "default": ["val", "train"], "choices": ["val", "train"]}
}
OTHERS: dict[str, tuple[str, Options]] = {  # command: (what it does, its options)
    "verify": (
        "read every file of a synthetic data set; exit code 1 if something is wrong",
        {
            "folder": {"help": "such as data/synthetic/shapes"},
            "--repair": {
                "action": "store_true",
                "help": "let generate.py make the damaged units again, and only these",
            },
            "--workers": {
                "type": int,
                "help": "threads (default: one for each core, at most 8)",
            },
        },
    ),
    "merge": (
        "join shards of one synthetic data set that were made in different places",
        {
            "sources": {"nargs": "+", "metavar": "FOLDER"},
            "--into": {
                "required": True,
                "metavar": "FOLDER",
                "help": "a new folder, or one with the same settings",
            },
        },
    ),
    "export": (
        "write a finished data set in the format of another tool",
        {
            "format": {"choices": list(FORMATS)},
            "folder": {"help": EXPORT_FOLDER},
            "target": {
                "help": "a new or empty folder, or that of the same export, interrupted or finished"
            },
            "--masks": {
                "default": "SegmentationClass",
                "help": "mask set: SegmentationClass (default) or masks/<set>",
            },
            "--split": {
                "nargs": "+",
                "metavar": "SPLIT",
                "help": "lists of samples (default: all that the set has)",
            },
            "--taxonomy": {
                "help": "voc, coco, shapes or a YAML file, where the folder does not tell its "
                "classes"
            },
        },
    ),
}


def _web(archives: Iterable[str]) -> Options:
    """Options of a data set that is downloaded."""
    what = f"of an archive ({', '.join(archives)})"
    checksum = f"checksum {what}; with --url alone it is recorded at the first download and "
    return {
        "--existing": {"help": "an existing copy, read where it lies (never written to)"},
        "--url": {**SEVERAL, "metavar": "ARCHIVE=URL", "help": f"another address {what}"},
        "--checksum": {
            **SEVERAL,
            "metavar": "ARCHIVE=md5:...|sha256:...",
            "help": f"{checksum}compared later",
        },
    }


def _add(parser: ArgumentParser, options: Options) -> None:
    for name, how in options.items():
        parser.add_argument(name, **how)


class Parser(ArgumentParser):
    """Its help names commands as they are typed here."""

    def format_help(self) -> str:
        return spelled(super().format_help())


def _parser() -> ArgumentParser:
    parser = Parser(prog=program(), description="Commands of Dataset Diffusion.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in DOORS.items():  # :func:`main` hands them on; here for help and completion
        one = commands.add_parser(name, help=text, add_help=False)
        one.add_argument("-h", "--help", "-m", "--multirun", action="store_true")
        settings: Any = one.add_argument("settings", nargs="*", metavar="KEY=VALUE")
        settings.completer = complete_setting
    prepare = commands.add_parser("prepare", help="write a data set to disk in PASCAL VOC layout")
    kinds = prepare.add_subparsers(dest="data", required=True)
    root = "folder to write below (default: data); data_root of the other commands"
    for kind, (text, options, _) in PREPARED.items():
        one = kinds.add_parser(kind, help=text, description=text)
        _add(one, {"--root": {"default": "data", "help": root}, **options})
    others = {name: commands.add_parser(name, help=text) for name, (text, _) in OTHERS.items()}
    for name, one in others.items():
        _add(one, OTHERS[name][1])
    how = others["export"].add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="copies of the files (default)")
    link = "hard links where the same file will do: to change one changes both"
    how.add_argument("--link", action="store_true", help=link)
    init_options(commands)
    text = "the training runs below a folder: data, steps, mIoU, unfinished ones"
    runs = commands.add_parser("runs", help=text)
    runs.add_argument("folder", nargs="?", default="outputs", help="default: outputs")
    run_options(commands)
    return parser


def _open(door: str, settings: list[str]) -> NoReturn:
    """What the root script of that name does."""
    sys.argv = [sys.argv[0], door, *settings]
    from dd import config  # Lightning and Hydra

    config.main(importlib.import_module(f"dd.cli.{door}").DOOR, named=True)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in DOORS:
        _open(given[0], given[1:])
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(given)
    try:
        if options.command != "prepare":
            return COMMANDS[options.command](options)
        for folder, notes in _prepare(options):
            for note in notes:
                print(f"warning: {spelled(note)}", file=sys.stderr)
            print(f"ready: {folder}")
    except (ValueError, OSError, Busy) as error:
        print(f"error: {spelled(shortened(str(error)))}", file=sys.stderr)
        if isinstance(error, Busy):
            return EXIT["busy"]
        return EXIT["cannot write"] if getattr(error, "errno", None) in CANNOT_WRITE else 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _prepare(options: Namespace) -> Prepared:
    """[(folder, warnings)] of the chosen command."""
    _, _, prepare = PREPARED[options.data]
    return prepare(options)


def _web_data(
    options: Namespace, known: dict[str, Archive]
) -> tuple[str, dict[str, Archive], str | None]:
    """(folder, archives, existing copy) of a data set that is downloaded."""
    urls, checksums = _pairs("--url", options.url), _pairs("--checksum", options.checksum)
    return options.root, _archives(known, urls, checksums), options.existing


def _voc(options: Namespace) -> Prepared:
    return [voc.prepare_voc(*_web_data(options, voc.ARCHIVES))]


def _voc_aug(options: Namespace) -> Prepared:
    where = _web_data(options, voc.ARCHIVES)
    return [voc.prepare_voc_aug(*where, options.sbd, options.workers)]


def _coco(options: Namespace) -> Prepared:
    where = _web_data(options, coco.ARCHIVES)
    return [coco.prepare_coco(*where, options.splits, options.workers)]


def _given_images(options: Namespace) -> Prepared:
    given = GivenImages(options.images, options.captions, options.fit, options.size)
    where = options.root, options.taxonomy, options.name
    return [prepare_images(*where, given, options.seed)]


def _verify(options: Namespace) -> int:
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers}: expected a number from 1 on")
    problems = verify(options.folder, options.repair, options.workers)
    print_problems(options.folder, problems, options.repair)
    return 1 if problems else 0


def _merge(options: Namespace) -> int:
    done = merge(options.sources, options.into)
    print(
        f"{done['copied']} of {done['samples']} samples copied to {options.into}, "
        f"{done['missing']} are not made yet"
    )
    print(
        "what is missing, and the masks: the command of the shards, in that folder "
        f"({repeated(str(done['command']))})"
    )
    return 0


def _export(options: Namespace) -> int:
    what = (options.format, options.folder, options.target)
    done = export(*what, options.masks, options.split, options.taxonomy, options.link)
    for note in done["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    how = "kept (by the names and sizes of its files)" if done["kept"] else "ready"
    print(f"{how}: {options.target} ({done['images']} images, {done['files']} files)")
    return 0


def _runs(options: Namespace) -> int:
    print_runs(list_runs(options.folder), options.folder)
    return 0


def _own(options: Namespace) -> tuple[Path, list[str]]:
    shares = {}
    for split, part in _pairs("--share", options.share).items():
        try:
            shares[split] = float(part)
        except ValueError:
            raise ValueError(
                f"--share {split}={part}: expected a part of 1, such as val=0.2"
            ) from None
    same = ("images", "masks", "cvat", "label_studio", "voc", "brushes_only", "seed", "group")
    ends = ("mask_ending", "mask_beginning", "image_ending", "image_beginning")
    data = OwnData(
        **{key: getattr(options, key) for key in (*same, "splits_of", *ends)},
        coco_file=_coco_files(options.coco),
        mapping=_pairs("--map", options.map),
        crowds=options.crowds == "ignore",
        split_files=_pairs("--split", options.split),
        shares=shares,
    )
    return prepare_own(options.root, options.taxonomy, options.name, data, options.workers)


def _coco_files(values: list[str] | None) -> str | dict[str, str] | None:
    """One file, or {split: file}."""
    if not values or (len(values) == 1 and (Path(values[0]).exists() or "=" not in values[0])):
        return values[0] if values else None
    found = _pairs("--coco", values)
    if len(found) < len(values):
        raise ValueError(
            "--coco: several files need a split each, as in --coco train=a.json --coco val=b.json"
        )
    return found


def _pairs(option: str, values: list[str]) -> dict[str, str]:
    wrong = [v for v in values if not all(v.partition("=")[::2])]
    if wrong:
        raise ValueError(f"{option} {wrong[0]}: expected NAME=VALUE")
    return dict(v.split("=", 1) for v in values)


def _archives(
    known: dict[str, Archive], urls: dict[str, str], checksums: dict[str, str]
) -> dict[str, Archive]:
    """The official archives, or others: another address comes without the official checksum."""
    unknown = sorted((urls.keys() | checksums.keys()) - known.keys())
    if unknown:
        raise ValueError(f"no archive {unknown[0]!r}; allowed: {', '.join(known)}")
    return {
        name: Archive(
            urls.get(name, one.url),
            checksums.get(name, None if name in urls else one.checksum),
            one.max_bytes,
        )
        for name, one in known.items()
    }


PREPARED: dict[str, tuple[str, Options, Prepare]] = {  # kind: (what it is, its options, how)
    "shapes": (
        "both domains of the embedded world",
        {},
        lambda options: [(folder, []) for folder in prepare_shapes(options.root)],
    ),
    "voc": ("PASCAL VOC 2012: train, val, trainval", _web(["trainval"]), _voc),
    "voc_aug": (
        "VOC 2012 with the masks of SBD: train_aug",
        {**WORKERS, **_web(voc.ARCHIVES), **SBD},
        _voc_aug,
    ),
    "coco": (
        "COCO 2017: 80 things and background",
        {**WORKERS, **_web(coco.ARCHIVES), **COCO},
        _coco,
    ),
    "images": (
        "images of any origin with captions, to be read by a model (generate.py stage=read)",
        GIVEN,
        _given_images,
    ),
    "own": (
        "your own images, with masks, a COCO JSON, or an export of CVAT or Label Studio",
        {**WORKERS, **OWN},
        lambda options: [_own(options)],
    ),
}
DOORS = {  # root script: what it does
    "generate": "make or change synthetic data: images, heat maps, masks",
    "train": "make a model: a segmenter, a generator, an adapter, a search or study of trainings",
    "evaluate": "numbers and pages about data and models",
}
assert tuple(DOORS) == SCRIPTS
COMMANDS = {
    "verify": _verify,
    "merge": _merge,
    "export": _export,
    "init": init,
    "runs": _runs,
    "deploy": deploy_run,
    "page": show_page,
}


if __name__ == "__main__":
    sys.exit(main())
