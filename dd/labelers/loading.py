"""From the name of a transformers segmenter to a model with all its weights: finds its folder, and
refuses another model, a pickle or an incomplete model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx  # the client it uses, under its own name
from safetensors import SafetensorError

from dd.labelers.base import ModelSettings
from dd.store.checkpoints import weights_sha256
from dd.store.provenance import read_json

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()  # a bar for loading a few files

# files of a repository that are read
FILES = ("*.json", "*.txt", "*.safetensors")
# errors that the libraries raise for damaged files
FAULTS = (OSError, SafetensorError, TypeError, AttributeError, KeyError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Kind:
    """``model``: name of a transformers class; ``types``: ``model_type`` of the configurations that
    it reads, including video models that contain it; ``known``: hub ids."""

    model: str
    types: tuple[str, ...]
    known: str


SAM2 = Kind("Sam2Model", ("sam2", "sam2_video"), "facebook/sam2.1-hiera-large")
SAM3 = Kind("Sam3Model", ("sam3", "sam3_video"), "facebook/sam3")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, its ``folder``, the hash of its weights, and its origin:
    ``made`` = {"model", "revision": commit or None}."""

    model: Any
    folder: Path
    weights_sha256: str
    made: dict[str, Any]


def load(kind: Kind, settings: ModelSettings, device: str = "cpu") -> Loaded:
    """The model that ``settings`` name, safetensors only, without code of its own.

    FileNotFoundError or ValueError for a name that cannot be found, a hub id without a commit, a
    gated repository, a model of another kind, damaged files and missing weights.
    """
    folder, commit = find(kind, settings.model, settings.revision)
    try:
        model, loading = getattr(transformers, kind.model).from_pretrained(
            folder,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except FAULTS as error:
        raise ValueError(
            f"labeler.model={settings.model!r} could not be loaded; is it complete? "
            f"{_first_line(error)}"
        ) from None
    if lacking := sorted(loading["missing_keys"]):
        raise ValueError(
            f"labeler.model={settings.model!r} lacks {len(lacking)} of {len(model.state_dict())} "
            f"weights of a {kind.model}, such as {', '.join(lacking[:3])}: they would stay random. "
            "Is it another size, or half a model? Download it again"
        )
    model.requires_grad_(False).to(device).eval()
    made = {"model": str(settings.model), "revision": commit}
    return Loaded(model, folder, weights_sha256(model.state_dict()), made)


def find(kind: Kind, model: str | None, revision: str | None) -> tuple[Path, str | None]:
    """(folder, commit or None) of a local folder, or of a hub id, which is downloaded (or found in
    the cache) at ``revision``. Errors as in :func:`load`."""
    if not model:
        raise ValueError(
            "labeler.model is not set: a local folder in transformers format, or a hub id such as "
            f"{kind.known} with labeler.revision=<commit>"
        )
    folder, commit = Path(model).expanduser(), None
    if not folder.exists():
        _check_hub_id(kind, model, revision)
        folder, commit = _download(kind, model, str(revision))
    elif revision is not None:
        raise ValueError(
            f"labeler.revision={revision} has no effect on the folder labeler.model={model}, whose "
            "weights are hashed; leave it out"
        )
    _check_kind(kind, model, folder / "config.json")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"labeler.model={model!r} holds no safetensors weights (*.safetensors); pickles can "
            "run code when loaded"
        )
    return folder, commit


def _check_hub_id(kind: Kind, model: str, revision: str | None) -> None:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"labeler.model={model!r}: no such folder. Give a local folder in transformers format, "
            f"or a hub id such as {kind.known}"
        )
    if not re.fullmatch("[0-9a-f]{40}", str(revision)):
        raise ValueError(
            f"labeler.revision={revision}: a hub id needs the commit, so that masks can be made "
            f"again. Look it up on https://huggingface.co/{model} (Files and versions, History: 40 "
            "hexadecimal digits)"
        )


def _check_kind(kind: Kind, model: str, config: Path) -> None:
    if not config.is_file():
        raise FileNotFoundError(
            f"labeler.model={model!r} has no config.json; is it in transformers format?"
        )
    found = read_json(config)
    found = found.get("model_type") if isinstance(found, dict) else None
    if found not in kind.types:
        raise ValueError(
            f"labeler.model={model!r} is a model of type {json.dumps(found)}, this labeler takes "
            f"{' or '.join(kind.types)}, such as {kind.known}"
        )


def _download(kind: Kind, model: str, commit: str) -> tuple[Path, str]:
    """Download only files that are used, and nothing of another kind of model. For a gated
    repository, the hub's own client reads the token from the environment or its login."""
    try:
        _check_kind(kind, model, Path(hf_hub_download(model, "config.json", revision=commit)))
        folder = snapshot_download(model, revision=commit, allow_patterns=list(FILES))
    except GatedRepoError:
        raise FileNotFoundError(
            f"labeler.model={model!r} is gated: accept its licence on https://huggingface.co/"
            f"{model}, then give an access token of that account in the variable HF_TOKEN (or log "
            "in: hf auth login). It is never written anywhere"
        ) from None
    except (OSError, httpx.HTTPError) as error:
        raise FileNotFoundError(
            f"labeler.model={model!r} could not be loaded: {_first_line(error)}\n"
            "A hub id needs a network (or a filled cache); without one give the folder of a copy: "
            "labeler.model=/path/to/the/folder"
        ) from None
    return Path(folder), commit


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
