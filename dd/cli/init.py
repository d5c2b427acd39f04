"""``python -m dd init``: a guided start."""

import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from dd.cli import questions
from dd.data.datasets import read_split
from dd.data.folders import IMAGES, MASKS, index, shared_splits
from dd.stages.init import (
    NEEDS,
    RECIPES,
    Site,
    check,
    check_conditions,
    check_name,
    check_photos,
    few_to_score,
    init_files,
    init_taxonomy,
    site_taxonomy,
    strange_words,
    summary,
)
from dd.stages.prepare_own import OwnData, prepare_own
from dd.store.commands import spelled

SEVERAL: dict[str, Any] = {"action": "append", "default": []}
PHRASES = {"metavar": "NAME=PHRASE,...", "help": "such as lighting=dim light,neon light"}
OPTIONS: dict[str, dict[str, Any]] = {
    "name": {"help": "of the site, its experiments and its data, such as my-site"},
    "--class": {
        **SEVERAL,
        "dest": "classes",
        "metavar": "NAME[=SYNONYM,...]",
        "help": "in mask order",
    },
    "--condition": {**SEVERAL, **PHRASES},
    "--photos": {
        "metavar": "FOLDER",
        "help": "unlabelled photographs, for captions; never written to",
    },
    "--images": {"metavar": "FOLDER", "help": "labelled photographs, with --masks; only read"},
    "--masks": {
        "metavar": "FOLDER",
        "help": "their masks: the same stems, class ids as pixel values",
    },
    "--generator": {
        "choices": list(RECIPES),
        "help": "sd15 (default), or embedded: a trial on any machine",
    },
    "--root": {
        "default": "data",
        "help": "folder of data (default: data); data_root of the other commands",
    },
    "--conf": {  # read where a command is started, before the files of this package
        "default": "conf",
        "help": "folder to write the configuration to (default: conf, in the working folder)",
    },
}


def init_options(commands: Any) -> None:
    parser = commands.add_parser(
        "init",
        help="a guided start: the configuration of a site of your own",
        epilog="without --class it asks, on a terminal",
    )
    for name, how in OPTIONS.items():
        parser.add_argument(name, **how)


def init(options: Namespace) -> int:
    classes = questions.pairs("--class", options.classes)
    phrases = questions.pairs("--condition", options.condition)
    asks = not classes
    if asks:
        if not sys.stdin.isatty():
            raise ValueError(
                "init asks only on a terminal; without one give --class NAME=SYNONYM,... for each "
                "class"
            )
        try:
            classes, phrases = _ask(options, phrases)
        except EOFError:
            raise ValueError(
                "the questions were not answered to the end; nothing was written"
            ) from None
    if (options.images is None) != (options.masks is None):
        raise ValueError(
            "labelled photographs need both --images and --masks; without labels give neither "
            "(--photos)"
        )
    site = Site(options.name, classes, phrases, options.photos, options.generator or "sd15")
    for note in strange_words(check(site)):
        print(f"warning: {note}", file=sys.stderr)
    labelled, kept = _labelled(options)
    print("\n".join(summary(site, labelled, kept)))
    if labelled is not None and (few := few_to_score(kept)):
        print(f"warning: {few}", file=sys.stderr)
    if asks and not _agreed():
        print("nothing was written")
        return 1
    train_images = _write_data(site, options)
    for path in init_files(site, options.conf, train_images):
        print(f"ready: {path}")
    root = "" if options.root == "data" else " " + shlex.quote(f"data_root={options.root}")
    commands = ["generate.py experiment={}", "train.py experiment={}_synthetic"]
    if train_images is not None:
        commands += [
            "evaluate.py run=outputs/{0}_synthetic data={0}",
            "train.py experiment={}_budget",
        ]
    for first, command in zip(["next: ", *[" " * 6] * 3], commands, strict=False):
        print(spelled(f"{first} python {command.format(site.name)}{root}"))
    return 0


def _ask(
    options: Namespace, phrases: dict[str, list[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(classes, conditions). Folders and generator are stored in ``options``. Each answer is
    checked at once."""
    options.name = questions.ask_name(options.name, check_name)
    classes = questions.ask_classes(lambda found: site_taxonomy(Site(options.name, found)))
    phrases = phrases or questions.ask_conditions(check_conditions)
    images, masks = (lambda folder: index(folder, IMAGES)), (lambda folder: index(folder, MASKS))
    ask = questions.ask_folder
    options.photos = options.photos or ask("folder of unlabelled photographs", check_photos)
    options.images = options.images or ask("folder of labelled photographs", images)
    if options.images:
        options.masks = options.masks or ask("folder of their masks", masks)
    if options.images and not options.masks:
        print("  without masks they are not labelled: left out")
        options.images = None
    options.generator = options.generator or questions.ask_choice("generator", NEEDS, "sd15")
    return classes, phrases


def _agreed() -> bool:
    try:
        return questions.agreed()
    except EOFError:
        return False


def _labelled(options: Namespace) -> tuple[int | None, int]:
    """(labelled images, number of them kept for the score)."""
    if options.images is None:
        return None, 0
    ids = index(options.images, IMAGES).keys() & index(options.masks, MASKS).keys()
    return len(ids), len(shared_splits({"val": 0.2}, ids, 0)["val"]) if len(ids) > 1 else 0


def _write_data(site: Site, options: Namespace) -> int | None:
    """Write the classes and the labelled photographs; returns how many of these are for
    training."""
    folder = Path(options.root) / site.name
    new, empty = not folder.with_name(f"{site.name}.yaml").exists(), not folder.exists()
    taxonomy = init_taxonomy(site, options.root, options.conf)
    if options.images is None:
        return None
    try:
        data = OwnData(options.images, options.masks)
        folder, notes = prepare_own(options.root, taxonomy, site.name, data)
    except BaseException as error:
        if new:  # so that other classes can be given
            taxonomy.unlink(missing_ok=True)
        if empty and isinstance(error, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return len(read_split(folder, "train"))
