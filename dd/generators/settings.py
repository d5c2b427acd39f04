"""The settings of a generator."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from annotated_types import Ge, Le, MinLen
from pydantic import BeforeValidator, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from dd.store.settings import Count, Hint, NoResult, Settings

FullPrompt: TypeAlias = Literal["appended", "caption"]  # words of the full prompt to read
SHARES_MEMORY = NoResult("which memory holds the weights while they wait")


def _as_typed(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Keep a number as it was typed (7, not 7.0), because it is recorded."""
    check(value)
    return value


def _switch(value: Any) -> Any:
    """Undo YAML's reading of a bare on as true."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["on", "off"], BeforeValidator(_switch)]
Number = Annotated[float, WrapValidator(_as_typed)]


class GeneratorSettings(Settings):
    """Where a setting names a side, None takes the checkpoint's own or the paper's share.

    Model: ``model`` is ``embedded``, ``embedded_mmdit``, a local folder in diffusers format, or a
    hub id (with ``revision``, a commit if ``require_revision``). Only safetensors are read, of
    ``variant`` (``fp16`` if a folder holds nothing else). ``adapter``: a run folder of train.py or
    a file of LoRA weights, added ``adapter_weight`` times to the checkpoint's own
    (:mod:`dd.generators.adapter`). ``licence`` and ``link``: of the weights, for the data card.

    Drawing: ``scheduler``: a diffusers scheduler class name, or None for the checkpoint's own.
    ``size``: side of the image in pixels. ``true_guidance``: FLUX's guidance by a negative prompt.
    ``max_tokens``: of a prompt, for T5 and chat encoders; ``t5``: False leaves out Stable Diffusion
    3's T5. ``safety_checker``: the checkpoint's own, ``on`` or ``off``. ``truncate``: convert
    pixels to bytes by cutting off decimals instead of rounding.

    Where attention is read: ``cross_resolution`` and ``self_resolution``: side of the attention
    maps, None for a quarter and a half of the latent (SD at 512 px: 16 and 32; XL at 1024 px: 32
    and 64); heat has the side of the latter. ``cross_layers`` and ``cross_heads``: cross-attention
    layers (by the beginning of their names) and heads to read, None for all of that resolution;
    ``self_layers``: layers whose attention among pixels is read; ``pool``: average it over patches
    of ``pool`` pixels a side. ``cross_groups``: further sides of cross-attention whose heat is
    stored separately (``weight`` of the mask steps, :mod:`dd.masks.chain`). ``head_weights``: weigh
    heads at each pixel by their share in the layer's output; ``layer_weights``: the name of a
    layer; others are weighed by their agreement with it (:mod:`dd.attention.weights`).

    What and when: ``max_power``: heat is stored for the powers 0 ... max_power. ``full_prompt``:
    also store the maps of words of the full prompt (ablations): ``appended``, the class words after
    the caption; ``caption``, the caption's own; True, both, or only the caption's own if none are
    appended. ``background_words``: words that follow those of the classes in the class prompt and
    compete with them; their heat is stored too (iSeg). ``capture_every``: read every
    ``capture_every``-th step, starting with the first. ``reading``: while drawing (``sampling``),
    ``after`` drawing in one forward pass of the finished latent at each timestep of ``read_at`` (of
    1,000), or ``both``; ``read_draws``: noises at each of these; ``mirror``: also read the mirrored
    image and keep the mean of both heats. ``class_forward``: a second forward pass at each step
    with the class prompts, whose words are then read (joint attention). ``word_errors``: timesteps
    (of 1,000) at which a reading after drawing measures how much each class word explains of the
    image (:mod:`dd.masks.presence`).

    Memory and speed: ``quantize``: the network's weights wait in eight bits and are widened layer
    by layer when used. ``vae_slicing`` and ``offload`` (``none``, ``model`` or ``sequential``) save
    GPU memory; ``channels_last``, ``fused_projections`` and ``compile``
    (:mod:`dd.generators.speed`) save time and round differently.
    """

    noun = "diffusion"

    model: str | None = "embedded"
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    steps: Annotated[int, Ge(1), Le(1000), Hint("those of the training")] = 25
    guidance: Annotated[Number, Hint("such as 7.5")] = 7.5
    negative_prompt: str = ""
    scheduler: str | None = "DPMSolverMultistepScheduler"
    size: Annotated[Count | None, Hint("the side in pixels: images are square")] = None
    cross_resolution: int | None = None
    self_resolution: int | None = None
    max_power: Annotated[int, Ge(0), Le(64), Hint("the heat of each power is kept")] = 8
    full_prompt: Annotated[bool | FullPrompt, Hint("true reads all its words")] = False
    # From here on an identity names only what differs from the defaults.
    safety_checker: Switch = "off"
    vae_slicing: bool = False
    channels_last: bool = False
    fused_projections: bool = False
    compile: bool = False
    cross_layers: list[str] | None = None
    cross_heads: list[int] | None = None
    cross_groups: Annotated[list[Count] | None, MinLen(1)] = None
    background_words: Annotated[list[str] | None, MinLen(1)] = None
    word_errors: Annotated[
        list[Annotated[int, Ge(1), Le(999)]] | None,
        MinLen(1),
        Hint("at least one of 1 to 999, or null"),
    ] = None
    capture_every: Count = 1
    truncate: bool = False
    reading: Literal["sampling", "after", "both"] = "sampling"
    read_at: Annotated[
        list[Annotated[int, Ge(0), Le(999)]], MinLen(1), Hint("at least one of 0 to 999")
    ] = [100]
    read_draws: Count = 1
    mirror: bool = False
    self_layers: list[str] | None = None
    pool: Count = 1
    max_tokens: Count | None = None
    true_guidance: float = 1.0
    t5: bool = True
    quantize: Literal["float8"] | None = None
    class_forward: bool = False
    head_weights: bool = False
    layer_weights: str | None = None
    variant: Annotated[str | None, NoResult("the hash of the weights tells")] = None
    require_revision: Annotated[bool, NoResult("asks for a record, changes none")] = False
    offload: Annotated[Literal["none", "model", "sequential"], SHARES_MEMORY] = "none"
    licence: Annotated[str | None, NoResult("for the data card")] = None
    link: Annotated[str | None, NoResult("for the data card")] = None
    adapter: Annotated[str | None, NoResult("the hash of its file tells")] = None
    adapter_weight: Annotated[
        float, Ge(0), Hint("1 = as trained"), NoResult("named with the adapter's hash")
    ] = 1.0

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.adapter is None and self.adapter_weight != 1:
            raise ValueError(
                f"diffusion.adapter_weight={self.adapter_weight} has no effect without "
                "diffusion.adapter=<run or file>"
            )
        if self.adapter is not None and self.quantize is not None:
            raise ValueError(
                "diffusion.adapter and diffusion.quantize: an adapter can be merged only into "
                "weights that are not quantised; give one of the two"
            )
        if self.fused_projections and (self.quantize is not None or self.offload == "sequential"):
            raise ValueError(
                "diffusion.fused_projections=true joins weights that diffusion.quantize and "
                "diffusion.offload=sequential keep apart; leave it false"
            )
        if self.class_forward and self.reading == "after":
            raise ValueError(
                "diffusion.class_forward=true has no effect with diffusion.reading=after, which "
                "shows the class prompt anyway"
            )
        weighed = self.head_weights or self.layer_weights is not None
        if weighed and self.cross_heads is not None:
            raise ValueError(
                "diffusion.head_weights and diffusion.layer_weights weigh all heads; leave "
                f"diffusion.cross_heads={list(self.cross_heads)} null"
            )
        if weighed and self.cross_groups is not None:
            raise ValueError(
                "diffusion.head_weights and diffusion.layer_weights weigh the layers of one side; "
                f"leave diffusion.cross_groups={list(self.cross_groups)} null"
            )
        if weighed and self.offload == "sequential":
            raise ValueError(
                "diffusion.head_weights and diffusion.layer_weights read the layers' own "
                "projections, which diffusion.offload=sequential keeps elsewhere; leave it none "
                "or model"
            )
        if self.reading == "sampling" and (self.mirror or self.read_draws > 1):
            raise ValueError(
                f"diffusion.mirror={str(self.mirror).lower()} and diffusion.read_draws="
                f"{self.read_draws} belong to a reading after drawing; with diffusion.reading="
                "sampling they have no effect. Give reading=after or both, or leave them out"
            )
        if self.reading == "sampling" and self.word_errors is not None:
            raise ValueError(
                f"diffusion.word_errors={list(self.word_errors)} are measured after drawing; with "
                "diffusion.reading=sampling they are not. Give reading=after or both, or leave "
                "them null"
            )
        if self.capture_every > 1 and self.reading == "after":
            raise ValueError(
                f"diffusion.capture_every={self.capture_every} has no effect with "
                "diffusion.reading=after, which reads no step of the drawing"
            )
        if self.capture_every > self.steps:
            raise ValueError(
                f"diffusion.capture_every={self.capture_every}: expected a whole number from 1 to "
                f"steps={self.steps}"
            )
        return self

    @property
    def checked(self) -> bool:
        """Whether the safety checker looks at images."""
        return self.safety_checker == "on"

    def identity(self) -> dict[str, Any]:
        names = [*type(self).model_fields]
        younger = names[names.index("safety_checker") :]
        known = super().identity()
        if self.reading == "sampling":
            known.pop("read_at")
        return {
            name: value
            for name, value in known.items()
            if name not in younger or value != type(self).model_fields[name].default
        }
