"""Families of text-to-image models, one module each. To add one: a class here, a row in FAMILIES, a
file in conf/diffusion/."""

from dd.generators.families.base import Family, Stream, Text
from dd.generators.families.flux import Flux
from dd.generators.families.flux_2_klein import Flux2Klein
from dd.generators.families.pixart import PixArtSigma
from dd.generators.families.qwen_image import QwenImage
from dd.generators.families.sana import Sana
from dd.generators.families.stable_diffusion import StableDiffusion
from dd.generators.families.stable_diffusion_3 import StableDiffusion3
from dd.generators.families.z_image import ZImage

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    PixArtSigma,
    Sana,
    StableDiffusion3,
    Flux,
    Flux2Klein,
    QwenImage,
    ZImage,
)
BY_PIPELINE = {name: family for family in FAMILIES for name in family.pipelines}
# Known pipelines whose attention cannot be read, and why.
REFUSED = dict.fromkeys(
    ("Lumina2Pipeline", "HunyuanImagePipeline"),
    "its refiners mix the words of the prompt: no key belongs to one word",
)

__all__ = ["BY_PIPELINE", "FAMILIES", "REFUSED", "Family", "Stream", "Text"]
