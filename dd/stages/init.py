"""Stage: write the commented configuration of a site of your own: classes, prompts, data, training
recipes, label-budget study."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dd.data.folders import IMAGES, index
from dd.data.label_studio import IGNORED
from dd.prompts.nouns import plurals
from dd.prompts.templates import indefinite
from dd.store.commands import same_commands, spelled
from dd.store.conf import CONF
from dd.store.names import folder_name
from dd.store.provenance import write_atomic
from dd.store.templates import fill
from dd.taxonomy import Taxonomy, taxonomy_yaml

NAME = re.compile(
    r"(?!(null|true|false|yes|no|on|off|y|n|inf|nan)$)[a-z][a-z0-9_-]*", re.IGNORECASE
)
TEMPLATES = Path(__file__).parent / "templates" / "site"
SHOTS = (16, 64, 256)
NEEDS = {
    "sd15": "Stable Diffusion 1.5, 512 px: needs its weights and a GPU",
    "embedded": "tiny, in the package: any machine; knows nothing of your classes, shows that "
    "every step runs",
}
RECIPES: dict[str, dict[str, Any]] = {  # for each generator: its images and trainings
    "embedded": {
        "masks": "refined",
        "images": 512,
        "unit": 32,
        "format": "png",
        "adapter": "shapes_adapt_generator",
        "recipe": "shapes_synthetic",
        "steps": {"synthetic": 540, "finetune": 60, "adapt_segmenter": 900},
    },
    "sd15": {
        "masks": "paper",
        "images": 2000,
        "unit": 4,
        "format": "jpg",
        "adapter": "sd_adapt_generator",
        "recipe": "paper_synthetic",
        "steps": {"synthetic": 20000, "finetune": 4000, "adapt_segmenter": 10000},
    },
}


@dataclass(frozen=True)
class Site:
    """The answers about a site. ``classes`` {name: synonyms} in mask order; ``conditions``
    {lighting: phrases}; ``photos``: folder of unlabelled photographs; ``generator``: a key of
    RECIPES."""

    name: str
    classes: Mapping[str, Sequence[str]]
    conditions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    photos: str | None = None
    generator: str = "sd15"


def site_taxonomy(site: Site) -> Taxonomy:
    """The checked classes of a site. ValueError for names that are empty, hold a comma or clash:
    words are compared without regard to case, number, hyphens and underscores, as in captions."""
    owner: dict[str, str] = {}
    for name, synonyms in site.classes.items():
        for word in (name, *synonyms):
            if not any(c.isalnum() for c in word):
                raise ValueError(
                    f"class {name!r}: got the empty word {word!r}; expected a noun such as gold "
                    "ring"
                )
            if "," in word or not word.isprintable() or set(word) & set("{}$;:#"):
                raise ValueError(
                    f"class {name!r}: {word!r} holds a comma or a character that captions cannot "
                    "hold; give each name alone"
                )
            if word.strip().casefold() in (IGNORED, "ignore"):
                raise ValueError(
                    f"class {name!r}: {word!r} is the name of pixels that do not count; give "
                    "another name"
                )
            for form in (word, *plurals(word)):
                key = re.sub(r"[\s_-]+", " ", form).strip().casefold()
                if owner.setdefault(key, name) != name:
                    said = f"the word {word!r} means both class {owner[key]!r} and {name!r}"
                    raise ValueError(
                        f"{said} (captions distinguish neither case nor number); remove it from "
                        "one of them"
                    )
    plain = {
        " ".join(name.split()): tuple(" ".join(w.split()) for w in words)
        for name, words in site.classes.items()
    }
    return Taxonomy(
        site.name, tuple(plain), {name: words for name, words in plain.items() if words}
    )


def strange_words(classes: Taxonomy, model: str = "embedded") -> list[str]:
    """A warning for each word with letters that are not Latin, with the pieces that the tokenizer
    of ``model`` cuts it into."""
    all_words = (w for name in classes.names for w in (name, *classes.synonyms.get(name, ())))
    words = [w for w in all_words if not w.isascii()]
    if not words:
        return []
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about optional packages
    from dd.generators.words import token_pieces  # takes seconds, so only if needed

    pieces = token_pieces(model, words)
    return [
        f"{word!r} holds letters that English captions do not: the tokenizer of {model} reads it "
        f"as {len(cut)} pieces {' '.join(cut)} (CLIP's, in Stable Diffusion, cuts it differently). "
        "The generator has seldom seen such a word: an English name gives better images"
        for word, cut in pieces.items()
    ]


def few_to_score(number: int) -> str | None:
    """A message if ``number`` labelled images, those kept for the score, are too few to decide
    anything."""
    from dd.evaluation.statistics import LEAST_IMAGES  # imports scipy, so only if needed

    if number >= LEAST_IMAGES:
        return None
    kept = f"{number} labelled image{'s are' if number != 1 else ' is'} kept for the score"
    return (
        f"{kept}, a fifth of all: with fewer than {LEAST_IMAGES} no difference of two trainings "
        f"can be told from chance. Label {5 * LEAST_IMAGES} images or more, or give a larger part "
        "(python -m dd prepare own --share val=0.5)"
    )


def check_name(name: str) -> None:
    """ValueError for a name that a site's files cannot have."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"name {name!r}: expected letters, digits, - and _, a letter first (no yes, on, "
            "null), such as my-site"
        )
    folder_name(name, "name")


def check_conditions(conditions: Mapping[str, Sequence[str]]) -> None:
    """ValueError for phrases that a prompt cannot hold."""
    for key, phrases in conditions.items():
        if not re.fullmatch(r"[a-z][a-z_]*", key) or key == "things":
            raise ValueError(f"condition {key!r}: expected a word such as place or lighting")
        if not phrases or any(
            not p.strip() or not p.isprintable() or set(p) & set("{}$;") for p in phrases
        ):
            raise ValueError(
                f"condition {key}: expected phrases without braces, $ and ;, such as dim light; "
                f"got {phrases}"
            )


def check_photos(photos: str) -> None:
    """FileNotFoundError or ValueError for an invalid folder of a site's photographs."""
    index(photos, IMAGES)
    if "$" in (path := str(Path(photos).resolve())):
        raise ValueError(
            f"photographs {path!r}: a path with $ cannot stand in a configuration; rename the "
            "folder"
        )


def check(site: Site) -> Taxonomy:
    """The classes of a site whose name, conditions and folders are valid. ValueError or
    FileNotFoundError."""
    check_name(site.name)
    if site.generator not in RECIPES:
        raise ValueError(f"generator {site.generator!r}; allowed: {', '.join(RECIPES)}")
    check_conditions(site.conditions)
    if site.photos is not None:
        check_photos(site.photos)
    return site_taxonomy(site)


def summary(site: Site, labelled: int | None, kept: int = 0) -> list[str]:
    """What will be written, in lines. ``labelled``: number of images (None without any), of which
    ``kept`` for the score."""
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


def init_taxonomy(site: Site, data_root: str | Path, conf: str | Path) -> Path:
    """Write ``data_root/<name>.yaml``, the classes, and return its path. First checks that nothing
    is in the way of any file."""
    path = Path(data_root) / f"{site.name}.yaml"
    text = taxonomy_yaml(check(site))
    made = _files(site, Path(conf), None)
    beside = Path(conf).resolve() != CONF.resolve()
    if taken := [f for f in made if beside and (CONF / f.relative_to(conf)).is_file()]:
        raise FileExistsError(
            f"{taken[0].relative_to(conf)} is a file of this package, and yours would be read "
            f"instead of it; choose another name than {site.name}"
        )
    planned = {path: text, **made}
    in_the_way = [p for p, new in planned.items() if p.exists() and not _kept(p, new, site)]
    if in_the_way:
        raise FileExistsError(
            f"{', '.join(map(str, in_the_way))} exist{'s' * (len(in_the_way) == 1)} with other "
            "content; nothing was changed. Choose another name, or move them away"
        )
    if not path.exists():
        write_atomic(path, text)
    return path


def init_files(site: Site, conf: str | Path, train_images: int | None) -> list[Path]:
    """Write the configuration of a site below ``conf``; existing files are kept. ``train_images``:
    labelled images to train on, None if there are none yet."""
    files = _files(site, Path(conf), train_images)
    for path, text in files.items():
        if not path.exists():
            write_atomic(path, text)
    return list(files)


def _kept(path: Path, text: str, site: Site) -> bool:
    """Whether a file already has the content to write, whichever command wrote it. A study of the
    site is kept as it is, since it may have been written for another number of labelled images."""
    there = path.read_text(encoding="utf-8", errors="replace")
    ours = re.match(r"# @package _global_\n# .* experiment=", there) is not None
    same = same_commands(there) == same_commands(text)
    return same or (path.stem == f"{site.name}_budget" and ours)


def _files(site: Site, conf: Path, train_images: int | None) -> dict[Path, str]:
    """{path: content} of all configuration files of a site."""
    name, how = site.name, RECIPES[site.generator]
    steps = how["steps"]
    total = steps["synthetic"] + steps["finetune"]
    trainings = {**steps, "mixed": total, "real": total}
    photos = site.photos and str(Path(site.photos).resolve())
    conditions = [key for key in site.conditions if key != "place"]
    place = " {place}" if "place" in site.conditions else ""
    words = {
        "template": f"a photo of {{things}}{place}" + "".join(f", {{{c}}}" for c in conditions),
        "words": "; ".join(", ".join(phrases) for phrases in site.conditions.values()),
        "shown": [f"a photo of {indefinite(c)}" for c in list(site.classes)[:3]],
        "shots": [k for k in SHOTS if train_images is None or k < train_images],
    }
    known = {**words, "name": name, "how": how, "photos": photos, "generator": site.generator}
    files = {
        f"data/{name}": "data",
        f"prompts/{name}": "prompts",
        f"prompts/{name}_llm": "prompts_llm",
        f"experiment/{name}": "experiment",
        f"experiment/{name}_segmenter": "segmenter",
        f"experiment/{name}_budget": "budget",
    }
    if photos:
        files[f"experiment/{name}_adapt_generator"] = "adapter"
    made = {
        key: fill(TEMPLATES / f"{template}.yaml.j2", **known, conditions=site.conditions)
        for key, template in files.items()
    }
    for recipe, number in trainings.items():
        if photos or recipe != "adapt_segmenter":
            made[f"experiment/{name}_{recipe}"] = fill(
                TEMPLATES / "training.yaml.j2", **known, recipe=recipe, steps=number
            )
    return {conf / f"{key}.yaml": spelled(text) for key, text in made.items()}
