"""Stage: a site of your own as a commented experiment: classes, prompts, data, training recipes, label-budget study."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dd.data.folders import IMAGES, index
from dd.data.label_studio import IGNORED
from dd.prompts.nouns import plurals
from dd.prompts.templates import indefinite
from dd.store.names import folder_name
from dd.store.provenance import write_atomic
from dd.taxonomy import Taxonomy, taxonomy_yaml

NAME = re.compile(r"(?!(null|true|false|yes|no|on|off|y|n|inf|nan)$)[a-z][a-z0-9_-]*", re.IGNORECASE)
SHOTS = (16, 64, 256)
NEEDS = {
    "sd15": "Stable Diffusion 1.5, 512 px: needs its weights and a GPU",
    "embedded": "tiny, in the package: any machine; knows nothing of your classes, shows that every step runs",
}
RECIPES = {  # generator: what its images and trainings are
    "embedded": {
        "masks": "shapes", "images": 512, "unit": 32, "format": "png", "adapter": "shapes_adapt_generator",
        "segmenter": "shapes_segmenter", "steps": {"synthetic": 540, "finetune": 60, "adapt": 900},
    },
    "sd15": {
        "masks": "paper", "images": 2000, "unit": 4, "format": "jpg", "adapter": "sd_adapt_generator",
        "segmenter": "voc_segmenter", "steps": {"synthetic": 20000, "finetune": 4000, "adapt": 10000},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """What is asked. ``classes`` {name: synonyms} in mask order; ``conditions`` {lighting: phrases}; ``photos``: folder of
    unlabelled photographs; ``generator``: a key of RECIPES."""

    name: str
    classes: Mapping[str, Sequence[str]]
    conditions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    photos: str | None = None
    generator: str = "sd15"


def site_taxonomy(site: Site) -> Taxonomy:
    """The checked classes of a site. ValueError for names that are empty, hold a comma or fall together: words are compared
    without regard to case, number, hyphens and underscores, as captions are read."""
    owner = {}
    for name, synonyms in site.classes.items():
        for word in (name, *synonyms):
            if not any(c.isalnum() for c in word):
                raise ValueError(f"class {name!r}: got the empty word {word!r}; expected a noun such as gold ring")
            if "," in word or not word.isprintable() or set(word) & set("{}$;:#"):
                raise ValueError(f"class {name!r}: {word!r} holds a comma or a sign of no caption; give each name alone")
            if word.strip().casefold() in (IGNORED, "ignore"):
                raise ValueError(f"class {name!r}: {word!r} is what pixels that do not count are called; give another name")
            for form in (word, *plurals(word)):
                key = re.sub(r"[\s_-]+", " ", form).strip().casefold()
                if owner.setdefault(key, name) != name:
                    said = f"the word {word!r} means both class {owner[key]!r} and {name!r}"
                    raise ValueError(f"{said} (captions tell neither case nor number apart); take it from one of them")
    plain = {" ".join(name.split()): tuple(" ".join(w.split()) for w in words) for name, words in site.classes.items()}
    return Taxonomy(site.name, tuple(plain), {name: words for name, words in plain.items() if words})


def strange_words(classes: Taxonomy, model: str = "embedded") -> list[str]:
    """A warning for each word with letters that are not Latin, with what the tokenizer of ``model`` makes of it."""
    all_words = (w for name in classes.names for w in (name, *classes.synonyms.get(name, ())))
    words = [w for w in all_words if not w.isascii()]
    if not words:
        return []
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about optional packages
    from dd.generators.words import token_pieces  # seconds, which other commands need not wait for

    pieces = token_pieces(model, words)
    return [
        f"{word!r} holds letters that English captions do not: the tokenizer of {model} reads it as {len(cut)} pieces "
        f"{' '.join(cut)} (that of Stable Diffusion, CLIP's, cuts it otherwise). The generator has seldom seen such a word: "
        "an English name gives better images"
        for word, cut in pieces.items()
    ]


def few_to_score(number: int) -> str | None:
    """What is to be said if ``number`` labelled images, those kept for the score, decide nothing."""
    from dd.evaluation.statistics import LEAST_IMAGES  # scipy, which other commands need not wait for

    if number >= LEAST_IMAGES:
        return None
    kept = f"{number} labelled image{'s are' if number != 1 else ' is'} kept for the score"
    return (
        f"{kept}, a fifth of all: with fewer than {LEAST_IMAGES} no difference of two trainings "
        f"can be told from chance. Label {5 * LEAST_IMAGES} images or more, or give a larger part "
        "(python -m dd prepare own --share val=0.5)"
    )


def check_name(name: str) -> None:
    """ValueError for a name that cannot be that of a site's files."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"name {name!r}: expected letters, digits, - and _, a letter first (no yes, on, null), such as my-site"
        )
    folder_name(name, "name")


def check_conditions(conditions: Mapping[str, Sequence[str]]) -> None:
    """ValueError for phrases that cannot stand in a prompt."""
    for key, phrases in conditions.items():
        if not re.fullmatch(r"[a-z][a-z_]*", key) or key == "things":
            raise ValueError(f"condition {key!r}: expected a small word such as place or lighting")
        if not phrases or any(not p.strip() or not p.isprintable() or set(p) & set("{}$;") for p in phrases):
            raise ValueError(f"condition {key}: expected phrases without braces, $ and ;, such as dim light; got {phrases}")


def check_photos(photos: str) -> None:
    """FileNotFoundError or ValueError for a folder that cannot be that of a site's photographs."""
    index(photos, IMAGES)
    if "$" in (path := str(Path(photos).resolve())):
        raise ValueError(f"photographs {path!r}: a path with $ cannot stand in a configuration; rename the folder")


def check(site: Site) -> Taxonomy:
    """The classes of a site whose name, conditions and folders are in order. ValueError or FileNotFoundError."""
    check_name(site.name)
    if site.generator not in RECIPES:
        raise ValueError(f"generator {site.generator!r}; allowed: {', '.join(RECIPES)}")
    check_conditions(site.conditions)
    if site.photos is not None:
        check_photos(site.photos)
    return site_taxonomy(site)


def summary(site: Site, labelled: int | None, kept: int | None) -> list[str]:
    """What is to be written, in lines. ``labelled`` images, of which ``kept`` for the score; None
    without any."""
    words = [f"{n} ({', '.join(w)})" if w else n for n, w in site.classes.items()]
    shown = {"classes": ", ".join(words)}
    shown |= {key: ", ".join(phrases) for key, phrases in site.conditions.items()}
    shown["photographs"] = "none" if site.photos is None else str(len(index(site.photos, IMAGES)))
    shown["labelled"] = "none yet"
    if labelled is not None:
        few = ", few" if few_to_score(kept) else ""
        shown["labelled"] = f"{labelled}: {labelled - kept} to train on, {kept} for the score{few}"
    shown["generator"] = f"{site.generator} ({NEEDS[site.generator]})"
    return [f"site {site.name}", *(f"  {key}: {text}" for key, text in shown.items())]


def init_taxonomy(site: Site, data_root, conf) -> Path:
    """Write ``data_root/<name>.yaml``, the classes, and return its path, once nothing that is to be written is in the way."""
    path = Path(data_root) / f"{site.name}.yaml"
    text = taxonomy_yaml(check(site))
    in_the_way = [p for p, new in {path: text, **_files(site, Path(conf), None)}.items() if p.exists() and not _same(p, new)]
    in_the_way = [p for p in in_the_way if p.stem != f"{site.name}_budget" or not _ours(p)]
    if in_the_way:
        raise FileExistsError(
            f"{', '.join(map(str, in_the_way))} exist{'s' * (len(in_the_way) == 1)} with other content; nothing was changed. "
            "Choose another name, or move them away"
        )
    if not path.exists():
        write_atomic(path, text)
    return path


def init_files(site: Site, conf, train_images: int | None) -> list[Path]:
    """Write the configuration of a site below ``conf``; files that are there are kept. ``train_images``: labelled images to
    train on, None if there are none yet."""
    files = _files(site, Path(conf), train_images)
    for path, text in files.items():
        if not path.exists():
            write_atomic(path, text)
    return list(files)


def _same(path: Path, text: str) -> bool:
    return path.read_text(encoding="utf-8", errors="replace") == text


def _ours(path: Path) -> bool:
    """A study written for another number of labelled images is kept as it is."""
    return path.read_text(encoding="utf-8", errors="replace").startswith("# @package _global_\n# python train.py experiment=")


def _files(site: Site, conf: Path, train_images: int | None) -> dict[Path, str]:
    """{path: content} of all configuration files of a site."""
    name, how = site.name, RECIPES[site.generator]
    many, few, photos = (how["steps"][part] for part in ("synthetic", "finetune", "adapt"))
    train = {
        "synthetic": (
            "The synthetic images alone: no label of yours is used.",
            f"source: synthetic\ntrainer: {{max_steps: {many}}}",
        ),
        "finetune": (
            "The synthetic-only run goes on with a few labelled photographs: shots=16 or shots=all.",
            f"source: real\nshots: 16\ninit_from: ${{output_root}}/{name}_synthetic\ntrainer: {{max_steps: {few}}}",
        ),
        "mixed": (
            "Labelled photographs and synthetic images in one training, half of the draws each.",
            f"source: mixed\nshots: 16\nreal_share: 0.5\ntrainer: {{max_steps: {many + few}}}",
        ),
        "real": (
            "The control: labelled photographs alone, for as many steps in total.",
            f"source: real\nshots: 16\ntrainer: {{max_steps: {many + few}}}",
        ),
    }
    if site.photos is not None:
        train["adapt_segmenter"] = (
            "The synthetic-only run goes on with unlabelled photographs beside the synthetic images (docs/adapt.md).",
            f"source: synthetic\ninit_from: ${{output_root}}/{name}_synthetic\ntrainer: {{max_steps: {photos}}}\n"
            f"unlabelled: {{images: {_photos(site)}}}",
        )
    files = {
        f"data/{name}": _data(site),
        f"prompts/{name}": _prompts(site),
        f"prompts/{name}_llm": _llm(site),
        f"experiment/{name}": _generate(site, how),
        f"experiment/{name}_segmenter": "# @package _global_\n# What all trainings of the site share: segmenter and data.\n"
        f"defaults:\n  - {how['segmenter']}\n  - override /data: {name}\nname: {name}_segmenter\n"
        "trainer: {precision: bf16-mixed}    # 32-true, the paper's, takes about twice as long\n",
        f"experiment/{name}_budget": _budget(site, train_images),
    }
    if site.photos is not None:
        files[f"experiment/{name}_adapt_generator"] = _adapter(site, how)
    for recipe, (why, body) in train.items():
        more = ", override /self_training: mean_teacher" if recipe == "adapt_segmenter" else ""
        files[f"experiment/{name}_{recipe}"] = (
            f"# @package _global_\n# python train.py experiment={name}_{recipe}\n# {why}\n"
            f"defaults: [{name}_segmenter{more}]\nname: {name}_{recipe}\n{body}\n"
        )
    return {conf / f"{key}.yaml": text for key, text in files.items()}


def _data(site: Site) -> str:
    return (
        f"# The site's labelled photographs (docs/own-site.md). Without any yet:\n"
        f"#   python -m dd prepare own --taxonomy data/{site.name}.yaml --name {site.name} --images ... --masks ...\n"
        f"name: {json.dumps(site.name)}\n" + "taxonomy: ${data_root}/${data.name}.yaml\nroot: ${data_root}/${data.name}\n"
        "images: null              # null = the folders that prepare recorded\nmasks: SegmentationClass\ntrain_split: train\n"
        "tune_split: null          # prepare own --share tune=0.1 makes one\ntest_split: val\n"
    )


def _prompts(site: Site) -> str:
    names = [key for key in site.conditions if key != "place"]
    middle = " {place}" if "place" in site.conditions else ""
    template = "a photo of {things}" + middle + "".join(f", {{{key}}}" for key in names)
    rows = "".join(f"  {key}: {json.dumps(list(p), ensure_ascii=False)}\n" for key, p in site.conditions.items())
    return (
        "# What the site looks like, in words: conf/prompts/site.yaml explains each key. One phrase of each condition is\n"
        "# drawn for each prompt; add conditions and templates that name them.\n"
        "_target_: dd.prompts.templates.TemplatePrompts\nappend: true\n"
        + (
            "counts: [1.0]             # one class a prompt: the embedded generator reads 40 short tokens\n"
            if site.generator == "embedded"
            else "counts: [0.4, 0.4, 0.2]   # weights of prompts with 1, 2 and 3 different classes\n"
        )
        + f"templates:\n  - {json.dumps(template)}\n"
        + (f"conditions:\n{rows}" if rows else "conditions: {}\n")
    )


def _llm(site: Site) -> str:
    words = "; ".join(", ".join(phrases) for phrases in site.conditions.values())
    return (
        "# The same conditions in free text, for captions that a language model writes (docs/prompts.md):\n"
        f"#   python generate.py experiment={site.name} prompts={site.name}_llm prompts.model=<model> name={site.name}_llm\n"
        f"defaults: [llm]\nconditions: {json.dumps(words, ensure_ascii=False)}\n"
    )


def _generate(site: Site, how: dict) -> str:
    name, photos = site.name, ""
    if site.photos is not None:
        photos = (
            "# Captions of the unlabelled photographs instead of templates, two commands:\n"
            f"#   generate.py experiment={name} stage=caption\n"
            f"#   generate.py experiment={name} prompts=paper_voc prompts.exclude_split=null name={name}_captions\n"
            f"caption: {{images: {_photos(site)}}}\n"
        )
    return (
        f"# @package _global_\n# python generate.py experiment={name}\n# Images with masks of the site's classes.\n"
        f"defaults:\n  - override /prompts: {name}\n  - override /diffusion: {site.generator}\n"
        f"  - override /masks: {how['masks']}\n  - override /data: {name}\n\nname: {name}\n"
        f"num_images: {how['images']}\nunit_size: {how['unit']}             # images that are always made together\n"
        f"image_format: {how['format']}\n"
        + (
            "prompts_over_limit: trim  # captions lose words at the end, never their classes\n"
            * (site.generator == "embedded")
        )
        + photos
    )


def _photos(site: Site) -> str:
    return json.dumps(str(Path(site.photos).resolve()), ensure_ascii=False)


def _adapter(site: Site, how: dict) -> str:
    name, shown = site.name, [f"a photo of {indefinite(c)}" for c in list(site.classes)[:3]]
    return (
        f"# @package _global_\n# python train.py experiment={name}_adapt_generator\n"
        "# Moves the generator towards the unlabelled photographs; look at samples/ in its folder (docs/adapt.md). Then:\n"
        f"#   generate.py experiment={name} name={name}_adapted diffusion.adapter=outputs/{name}_adapt_generator\n"
        f"defaults:\n  - {how['adapter']}\n  - override /data: {name}\nname: {name}_adapt_generator\nadaptation:\n"
        f"  images: {_photos(site)}\n  list: null\n"
        "  captions: null          # better: captions.jsonl of generate.py stage=caption, or of evaluate.py stage=predict\n"
        f"  samples: {{prompts: {json.dumps(shown, ensure_ascii=False)}}}\n"
    )


def _budget(site: Site, train_images: int | None) -> str:
    name = site.name
    shots = [k for k in SHOTS if train_images is None or k < train_images]
    recipes = ", ".join(f"{r}: {name}_{r}" for r in ("synthetic", "finetune", "mixed", "real"))
    return (
        f"# @package _global_\n# python train.py experiment={name}_budget\n"
        "# How many labelled photographs are needed, with and without synthetic images (docs/budget.md).\n"
        f"defaults: [{name}_segmenter]\nname: {name}_budget\nstage: budget\nbudget:\n"
        f"  shots: {json.dumps([0, *shots, 'all'])}\n  choose: {{shots: {shots[-1] if shots else 'all'}, seed: 0}}\n"
        f"  experiments: {{{recipes}}}\n"
    )
