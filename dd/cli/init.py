"""``python -m dd init``: a guided start."""

import shlex
import sys
from pathlib import Path

from dd import questions
from dd.datasets import read_split
from dd.folders import IMAGES, MASKS, index
from dd.stages.init import RECIPES, Site, check, few_to_score, init_files, init_taxonomy, strange_words
from dd.stages.prepare_own import prepare_own


def init_options(commands) -> None:
    parser = commands.add_parser(
        "init", help="a guided start: the configuration of a site of your own", epilog="without --class it asks, on a terminal"
    )
    add = parser.add_argument
    add("name", help="of the site, its experiments and its data, such as my-site")
    add("--class", dest="classes", action="append", default=[], metavar="NAME[=SYNONYM,...]", help="in mask order")
    add("--condition", action="append", default=[], metavar="NAME=PHRASE,...", help="such as lighting=dim light,neon light")
    add("--photos", metavar="FOLDER", help="unlabelled photographs, for captions; only read")
    add("--images", metavar="FOLDER", help="labelled photographs, with --masks; only read")
    add("--masks", metavar="FOLDER", help="their masks: the same stems, class ids as pixel values")
    add("--generator", choices=list(RECIPES), default="sd15", help="sd15 (default), or embedded: a trial on any machine")
    add("--root", default="data", help="folder of data (default: data); data_root of the other commands")
    add("--conf", default=str(Path(__file__).parents[2] / "conf"), help="folder to write the configuration to (default: conf)")


def init(options) -> int:
    classes, phrases = (questions.pairs("--class", options.classes), questions.pairs("--condition", options.condition))
    if not classes:
        if not sys.stdin.isatty():
            raise ValueError("init asks only on a terminal; without one give --class NAME=SYNONYM,... for each class")
        try:
            classes = questions.ask_classes()
            phrases = phrases or questions.ask_conditions()
            options.photos = options.photos or questions.ask_folder("folder of unlabelled photographs")
            options.images = options.images or questions.ask_folder("folder of labelled photographs")
            options.masks = options.masks or (questions.ask_folder("folder of their masks") if options.images else None)
        except EOFError:
            raise ValueError("the questions were not answered to the end; nothing was written") from None
    if (options.images is None) != (options.masks is None):
        raise ValueError("labelled photographs need both --images and --masks; without labels give neither (--photos)")
    site = Site(options.name, classes, phrases, options.photos, options.generator)
    for note in strange_words(check(site)):
        print(f"warning: {note}", file=sys.stderr)
    for folder, kinds in ((options.images, IMAGES), (options.masks, MASKS)):
        if folder is not None:
            index(folder, kinds)
    new = not (Path(options.root) / f"{site.name}.yaml").exists()
    taxonomy, train_images = init_taxonomy(site, options.root, options.conf), None
    if options.images is not None:
        try:
            folder, notes = prepare_own(options.root, taxonomy, site.name, options.images, options.masks)
        except BaseException:
            if new:  # other classes may fit the masks
                taxonomy.unlink(missing_ok=True)
            raise
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        train_images = len(read_split(folder, "train"))
        if note := few_to_score(len(read_split(folder, "val"))):
            print(f"warning: {note}", file=sys.stderr)
    for path in init_files(site, options.conf, train_images):
        print(f"ready: {path}")
    root = "" if options.root == "data" else " " + shlex.quote(f"data_root={options.root}")
    print(f"next:  python generate.py experiment={site.name}{root}")
    print(f"       python train.py experiment={site.name}_synthetic{root}")
    if train_images is not None:
        print(f"       python evaluate.py run=outputs/{site.name}_synthetic data={site.name}{root}")
        print(f"       python train.py experiment={site.name}_budget{root}")
    return 0
