"""Captions of images by a transformers model (BLIP by default). Safetensors only, no code from
the model's repository."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from dd.store.checkpoints import weights_sha256

transformers.utils.logging.disable_progress_bar()  # a bar for loading a few files

DTYPES = ("float32", "float16", "bfloat16")


class Captioner:
    """``captioner(images)`` -> one caption for each image uint8 [H, W, 3].

    ``model``: a local folder or a hub id (with ``revision``) of any image-to-text model that writes
    from pixels alone, such as BLIP, BLIP-2, GIT or a ViT-GPT2. ``num_beams``: width of the beam
    search; nothing is random. FileNotFoundError or ValueError say what is wrong with the model.
    """

    def __init__(
        self,
        model: str = "Salesforce/blip-image-captioning-base",
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        max_new_tokens: int = 30,
        num_beams: int = 3,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"captioner.dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
        if max_new_tokens < 1 or num_beams < 1:
            raise ValueError(
                f"captioner: max_new_tokens={max_new_tokens} and num_beams={num_beams} "
                "must be at least 1"
            )
        self.search = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        self.settings = {"model": model, "revision": revision, "dtype": dtype, **self.search}
        self.device, self.dtype, place = device, getattr(torch, dtype), _find(model) or model
        where = {"revision": revision, "trust_remote_code": False}
        try:
            self.processor = AutoImageProcessor.from_pretrained(place, backend="pil", **where)
            self.tokenizer = AutoTokenizer.from_pretrained(place, **where)
            self.model = AutoModelForImageTextToText.from_pretrained(
                place, dtype=self.dtype, use_safetensors=True, **where
            )
        except (OSError, ValueError) as error:
            what = str(error).strip().splitlines() or [type(error).__name__]
            raise FileNotFoundError(
                f"captioner.model={model!r} could not be loaded: {what[0]}\n"
                "A hub id needs a network (or a filled cache) and a revision with safetensors "
                "weights; on a machine without a network, copy the model and give its folder: "
                "captioner.model=/path/to/folder"
            ) from None
        self.model.to(device).eval()

    def identity(self) -> dict[str, Any]:
        """What decides a caption: settings, weights, device type."""
        weights, device = weights_sha256(self.model.state_dict()), torch.device(self.device).type
        return {**self.settings, "weights_sha256": weights, "device": device}

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> list[str]:
        pixels = self.processor(
            images=list(images), return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"]
        try:
            tokens = self.model.generate(
                pixel_values=pixels.to(self.device, self.dtype), do_sample=False, **self.search
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"captioner.model={self.settings['model']!r} ({type(self.model).__name__}) "
                f"does not caption from pixels alone: {str(error)[:300]}. Choose an "
                "image-to-text model such as Salesforce/blip-image-captioning-base"
            ) from None
        starts = self._start_tokens()
        words = [[token for token in row if token not in starts] for row in tokens.tolist()]
        texts = self.tokenizer.batch_decode(words, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _start_tokens(self) -> set[int | None]:
        """Tokens that begin a caption: BLIP's [DEC] is one for the model, not for its tokenizer."""
        configs = (self.model.config.get_text_config(decoder=True), self.model.generation_config)
        return {
            getattr(c, name, None)
            for c in configs
            for name in ("bos_token_id", "decoder_start_token_id")
        }


def _find(model: str) -> Path | None:
    """The local folder of a model name, or None for a hub id. Errors for a missing folder, a folder
    without a model, and one with only pickles."""
    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise FileNotFoundError(
                f"captioner.model={model!r}: no such folder. Give a local folder in transformers "
                "format (with config.json) or a hub id such as "
                "Salesforce/blip-image-captioning-base"
            )
        return None
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"captioner.model={model!r}: {folder} has no config.json; is it in transformers format?"
        )
    if not list(folder.glob("*.safetensors")):
        kinds = (".bin", ".pt", ".pth", ".ckpt")
        pickles = sorted(f.name for f in folder.glob("*") if f.suffix in kinds)
        found = f", only pickles {pickles}, which can run code when loaded" if pickles else ""
        raise ValueError(
            f"captioner.model={model!r}: {folder} holds no safetensors weights{found}. "
            "Give a folder whose weights are *.safetensors"
        )
    return folder
