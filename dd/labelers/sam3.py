"""Segment Anything 3, prompted with the names of the classes; reads no heat (Carion et al., 2025,
arXiv:2511.16719). Supervision D.

Shape letters: B images, P pairs of an image and a class, Q queries, K classes, H W image size.
"""

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import transformers
from annotated_types import Gt, Lt

from dd.labelers.base import Asked, Images, Labelled, ModelSettings, Ready, in_parts
from dd.labelers.loading import SAM3, load
from dd.labelers.pixels import SAM3 as LOOK
from dd.labelers.pixels import Look, at_size, seen
from dd.masks.overlaps import resolve

TOKENS = 32  # of a text, including its first and last token (Sam3Processor)
Score = Annotated[float, Gt(0), Lt(1)]


class Sam3Settings(ModelSettings):
    """``ask``: about the classes of a sample's ``prompt``, or ``all`` of the data set; ``texts``:
    {class: text to ask with}, default its name; ``score``: least score of an object, ``mask``: and
    of a pixel in it (post_process_instance_segmentation's thresholds)."""

    ask: Literal["prompt", "all"] = "prompt"
    texts: dict[str, str] = {}
    score: Score = 0.3
    mask: Score = 0.5


class Sam3:
    """Prompts SAM 3 with the text of each class. A class has the pixels of all its objects, each
    with its highest score. Of overlapping classes the highest score wins; equal scores give 255 and
    are counted as ``ties``. ``settings``: :class:`Sam3Settings`."""

    Settings: ClassVar[type[Sam3Settings]] = Sam3Settings
    name = "sam3"
    reads = None

    def __init__(self, device: str = "cpu", **settings: Any) -> None:
        self.settings, self.device = Sam3Settings(**settings), device
        self.loaded = load(SAM3, self.settings, device)
        self.batch_size = self.settings.batch_size
        try:
            self.words = transformers.CLIPTokenizer.from_pretrained(
                self.loaded.folder, local_files_only=True
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"labeler.model={self.settings.model!r}: its tokenizer could not be loaded: "
                f"{str(error).splitlines()[0]:.200}"
            ) from None
        rows = self.loaded.model.config.text_config.vocab_size
        if not rows / 2 < len(self.words) <= rows:  # a library would create an empty vocabulary
            raise ValueError(
                f"labeler.model={self.settings.model!r}: its tokenizer knows {len(self.words)} "
                f"words, its text encoder {rows}. Is the vocabulary missing (vocab.json and "
                "merges.txt, or tokenizer.json)? Copy the folder from where it came from"
            )
        self.known: dict[str, Any] = {}  # encoded texts

    @property
    def look(self) -> Look:
        """The published model's side is 1008; smaller ones give theirs in the configuration."""
        return Look(int(self.loaded.model.config.vision_config.image_size), LOOK.mean, LOOK.std)

    def ready(self, images: Images) -> Ready:
        names, texts = images.taxonomy.names, self.settings.texts
        if unknown := sorted(texts.keys() - set(names)):
            raise ValueError(
                f"labeler.texts names {', '.join(unknown)}, which is not a class of "
                f"{images.folder}; its classes: {', '.join(names)}"
            )
        asked = names if self.settings.ask == "all" else {c for s in images.plan for c in s.classes}
        for name in sorted(asked):
            self._check(name, texts.get(name, name))
        ids = dict(zip(names, images.taxonomy.ids(names), strict=True))

        def label(batch: list[Asked]) -> list[Labelled]:
            return in_parts(lambda part: self.label(part, ids), batch)

        identity = {"weights_sha256": self.loaded.weights_sha256}
        return Ready(label, "D", identity, self.settings.identity(), made=self.loaded.made)

    def _check(self, name: str, text: str) -> None:
        number = len(self.words(text)["input_ids"])
        if not text.strip() or number > TOKENS:
            raise ValueError(
                f"class {name!r} is asked for by {text!r:.200}, {number} tokens; SAM 3 reads 1 to "
                f"{TOKENS}, two of them its own. Give a shorter text: labeler.texts={{{name}: ...}}"
            )

    def _text(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(features float [1, T, D], mask [1, T]) of a text; encoded once."""
        if text not in self.known:
            read = self.words(text, padding="max_length", max_length=TOKENS, return_tensors="pt")
            given = {k: read[k].to(self.device) for k in ("input_ids", "attention_mask")}
            features = self.loaded.model.get_text_features(**given).pooler_output
            self.known[text] = features, given["attention_mask"]
        return self.known[text]

    @torch.inference_mode()
    def label(self, batch: list[Asked], ids: dict[str, int]) -> list[Labelled]:
        """Masks of a batch; torch's OutOfMemoryError if memory is not enough. ``ids``: pixel values
        of the data set's classes."""
        model = self.loaded.model
        shown = seen([asked.image for asked in batch], self.look, self.device).to(model.dtype)
        vision = model.get_vision_features(shown)
        wanted = [list(ids) if self.settings.ask == "all" else a.sample.classes for a in batch]
        scores: list[list[np.ndarray]] = [[] for _ in batch]
        for b, names in enumerate(wanted):  # one image and one text at a time, to save memory
            own = _one(vision, b)
            for name in names:
                features, mask = self._text(self.settings.texts.get(name, name))
                text = transformers.modeling_outputs.BaseModelOutputWithPooling(
                    pooler_output=features
                )
                out = model(vision_embeds=own, text_embeds=text, attention_mask=mask)
                found = class_scores(out, batch[b].size, self.settings.score, self.settings.mask)
                scores[b].append(found.cpu().numpy())
        labelled = []
        for asked, names, own_scores in zip(batch, wanted, scores, strict=True):
            stacked = np.stack(own_scores) if own_scores else np.zeros((0, *asked.size))
            resolved = resolve(stacked, [ids[name] for name in names], asked.size)
            counts = {"overlaps": resolved.overlaps, "ties": resolved.ties}
            labelled.append(Labelled(resolved.mask, counts))
        return labelled


def _one(vision: Any, index: int) -> Any:
    """The vision encoder's output for one image of a batch."""
    parts = ("fpn_hidden_states", "fpn_position_encoding")
    chosen = {k: tuple(each[index : index + 1] for each in getattr(vision, k)) for k in parts}
    return type(vision)(**chosen)


def class_scores(out: Any, size: tuple[int, int], score: float, mask: float) -> torch.Tensor:
    """Scores float [H, W] of one class in one image: for each pixel the highest score of the
    objects that contain it, else 0. ``out``: of :class:`transformers.Sam3Model` for one image and
    one text. An object's score is its query's, times the score that the class is present."""
    scores_Q = out.pred_logits[0].float().sigmoid()
    if out.presence_logits is not None:
        scores_Q = scores_Q * out.presence_logits[0].float().sigmoid()
    kept = scores_Q > score
    if not kept.any():
        return torch.zeros(size, device=scores_Q.device)
    masks_QHW = at_size(out.pred_masks[0][kept].float().sigmoid(), size) > mask
    return (masks_QHW * scores_Q[kept][:, None, None]).amax(0)
