"""LoRA adapters of a pipeline, through peft: train and save low-rank weights, and merge them into a
checkpoint's own."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from dd.store.provenance import read_json, sha256, whole

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DOWN = r"\.(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight$"
UP = r"\.(?:lora_B|lora\.up|lora_linear_layer\.up)\.weight$"
# What a file may hold, as kohya, diffusers and peft name it; diffusers would skip anything else.
DOWN_IN_FILE = r"(?:\.lora_down|\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)\.weight"
UP_IN_FILE = r"(?:\.lora_up|\.lora_B|[._]lora\.up|\.lora_linear_layer\.up)\.weight"
READ = rf"(?:{DOWN_IN_FILE}|{UP_IN_FILE}|\.alpha)"
MAKE = "train.py experiment=shapes_adapt_generator (or sd_adapt_generator) makes one"
OTHER_METHODS = {
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "hada": "LoHa",
    "lokr": "LoKr",
    "lora_mid": "LoCon with a middle",
}


@dataclass(frozen=True)
class Adapter:
    """A checked file. ``base_sha256``: hash of the weights it was trained on, None if there is no
    run.json beside it."""

    file: Path
    base_sha256: str | None

    def sha256(self) -> str:
        return sha256(self.file)


def find_adapter(path: str | Path) -> Adapter:
    """The adapter of a run folder or of a file; nothing is loaded yet.

    FileNotFoundError if there is no such file or the training is not finished, ValueError for a
    pickle or another kind of file.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = _of_run(file, path)
    if file.suffix in PICKLES:
        raise ValueError(_pickle(path, "is a pickle"))
    if not file.is_file():
        raise FileNotFoundError(f"diffusion.adapter={path}: no such file or folder; {MAKE}")
    if file.suffix != ".safetensors":
        raise ValueError(f"diffusion.adapter={path}: expected a run folder or a *.safetensors file")
    beside = file.parent / "run.json"
    run = read_json(beside) if beside.is_file() else {}
    identity = run.get("identity") if isinstance(run, dict) else None
    return Adapter(file, identity.get("base_sha256") if isinstance(identity, dict) else None)


def _of_run(folder: Path, given: str | Path) -> Path:
    """The weights of a finished training."""
    file = folder / WEIGHTS
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles and not file.is_file():
        raise ValueError(_pickle(given, f"holds only {', '.join(pickles)}"))
    if (folder / "settings.json").is_file() and not (folder / "run.json").is_file():
        raise FileNotFoundError(
            f"diffusion.adapter={given}: its training has begun and is not finished; the same "
            "train.py command resumes it"
        )
    if not file.is_file():
        raise FileNotFoundError(f"diffusion.adapter={given}: no {WEIGHTS} in this folder; {MAKE}")
    return file


def _pickle(given: str | Path, what: str) -> str:
    return (
        f"diffusion.adapter={given} {what}, which can run code when loaded; an adapter is a "
        "*.safetensors file"
    )


def merge(pipe: DiffusionPipeline, adapter: Adapter, weight: float, base_sha256: str) -> None:
    """Add ``weight`` times the adapter to the pipeline's own weights. No separate adapter layers
    remain, so all speed options and the reading of attention work as without an adapter.

    ValueError for an adapter of another base model, for layers or shapes that do not fit, and for a
    damaged or unreadable file.
    """
    if adapter.base_sha256 is not None and adapter.base_sha256 != base_sha256:
        raise ValueError(
            f"diffusion.adapter={adapter.file} was trained on other weights (sha256 "
            f"{adapter.base_sha256[:12]}...) than those of diffusion.model (sha256 "
            f"{base_sha256[:12]}...). Give the model that its run.json names, or adapt this one. "
            "The same weights in another precision have another hash: to use the adapter with "
            "them, copy the file alone elsewhere"
        )
    try:
        with safe_open(adapter.file, "pt") as file:
            written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_written(written)
        state, _, _ = pipe.lora_state_dict(
            str(adapter.file), unet_config=pipe.unet.config, return_lora_metadata=True
        )
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"diffusion.adapter={adapter.file} cannot be read as LoRA weights: {error!s:.300}"
        ) from None
    either = f"(?:{DOWN_IN_FILE}|{UP_IN_FILE})$"
    lost = sum(bool(re.search(either, name)) for name in written) - len(state)
    if lost > 0:
        raise ValueError(
            f"diffusion.adapter={adapter.file}: {lost} of its tensors belong to no layer that "
            "diffusers knows"
        )
    parts = _check_fit(pipe, state, adapter.file)
    try:
        pipe.load_lora_weights(str(adapter.file))
        pipe.fuse_lora(components=parts, lora_scale=float(weight), safe_fusing=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"diffusion.adapter={adapter.file} does not fit diffusion.model: {error!s:.300}"
        ) from None
    pipe.unload_lora_weights()  # merged weights stay


def _check_written(written: Mapping[str, torch.Tensor]) -> None:
    """ValueError if the file holds anything that would not be merged, or numbers that are not
    finite."""
    strange = [name for name in written if not re.search(f"{READ}$", name)]
    if strange:
        text = " ".join(strange)
        kinds = [f" ({kind})" for part, kind in OTHER_METHODS.items() if part in text]
        raise ValueError(
            f"{len(strange)} of its {len(written)} tensors are not part of a LoRA"
            f"{''.join(kinds[:1])} and would be left out: {', '.join(strange[:3])}. Merge it with "
            "the tool that made it"
        )
    if any(name.startswith("base_model.") for name in written):
        raise ValueError(
            "its layers have peft's own names (base_model.model. ...): load it there, and save it "
            "with diffusers' save_lora_weights, or put unet. in place of base_model.model."
        )
    wrong = [name for name, tensor in written.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of its {len(written)} tensors hold numbers that are not finite, such "
            f"as {wrong[0]}"
        )


def _layer_name(pipe: DiffusionPipeline, key: str) -> str:
    """``unet.<layer>.lora....weight`` in the pipeline's own layer names, from the names that
    diffusers gives to a file's tensors."""
    part, _, name = key.partition(".")
    name = name.replace(".processor.", ".")
    if part == "unet":
        name = re.sub(r"\.(to_[qkv]|to_out)_lora\.", r".\1.lora.", name)
        name = name.replace(".to_out.lora.", ".to_out.0.lora.")
    else:
        name = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora.", name)
        if not hasattr(getattr(pipe, part, None), "text_model"):  # transformers dropped this level
            name = name.removeprefix("text_model.")
    return f"{part}.{name}"


def _layer(pipe: DiffusionPipeline, name: str) -> tuple[str, torch.Tensor] | None:
    """(part of the pipeline, weight of the layer) that the adapter's layer ``name`` changes."""
    found = re.fullmatch(rf"(unet|text_encoder|text_encoder_2)\.(.+?)({DOWN[:-1]}|{UP[:-1]})", name)
    part = getattr(pipe, found[1], None) if found else None
    if found is None or part is None:
        return None
    try:
        return found[1], part.get_submodule(found[2]).weight
    except AttributeError:
        return None


def _check_fit(pipe: DiffusionPipeline, state: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    """Parts of the pipeline that the adapter changes. ValueError for layers that are missing or
    have another size; diffusers only logs a line and skips them."""
    parts: set[str] = set()
    wrong = []
    for key, tensor in state.items():
        name = _layer_name(pipe, key)
        found = _layer(pipe, name)
        if found is None:
            wrong.append(f"{key}: no such layer")
            continue
        part, layer = found
        down = re.search(DOWN, name) is not None
        # down [rank, in], up [out, rank]; weight [out, in]
        if tensor.shape[down] != layer.shape[down]:
            wrong.append(f"{key}: {tuple(tensor.shape)} for a layer of {tuple(layer.shape)}")
        parts.add(part)
    if wrong or not parts:
        shown = "; ".join(wrong[:3]) or "it is empty"
        raise ValueError(
            f"diffusion.adapter={file} does not fit diffusion.model: {len(wrong)} of its "
            f"{len(state)} tensors: {shown}. It may be of another kind of model (1.x, 2.x and XL "
            "have other layers and sizes), or of another method: LoRA on linear and convolution "
            "layers of the UNet and the text encoders can be read"
        )
    return sorted(parts)


class Trainable:
    """A Stable Diffusion 1.x or 2.x with new LoRA layers in its UNet, as their training needs it.
    ``parameters``: of the LoRA layers; ``scheduler``: its noise schedule, which defines the
    prediction target; ``encode(captions)``: its text states [B, T, C]."""

    def __init__(self, generator: Any, seed: int, checkpointing: bool, **lora: Any) -> None:
        self._generator = generator
        self.parameters = add_lora(generator.pipe, **lora, seed=seed, checkpointing=checkpointing)
        self.scheduler = noise_schedule(generator.pipe)
        self.encode = generator.text_states

    def to(self, device: torch.device) -> None:
        """Move everything, including the generator that draws with it."""
        self._generator.pipe.to(device)
        self._generator.device = str(device)

    def latents(self, images_BCHW: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Scaled latents of images in [-1, 1], drawn by ``random``, float32."""
        vae = self._generator.pipe.vae
        drawn = vae.encode(images_BCHW).latent_dist.sample(random).float()
        return drawn * vae.config.scaling_factor

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The UNet's output for noised latents at timesteps ``t`` [B]."""
        return self._generator.pipe.unet(noisy, t, states).sample

    def save(self, path: str | Path) -> None:
        """Write the LoRA layers: :func:`save_adapter`."""
        save_adapter(path, self._generator.pipe)


def add_lora(
    pipe: DiffusionPipeline,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    seed: int,
    checkpointing: bool = False,
) -> list[torch.nn.Parameter]:
    """Put new LoRA layers (which change nothing yet) into the UNet and freeze everything else.
    Returns their parameters, in the UNet's order. ValueError for XL, which cannot be trained here,
    and for target modules that the UNet lacks."""
    if type(pipe) is not StableDiffusionPipeline:
        raise ValueError(
            f"adapter.model is a {type(pipe).__name__}; adapters are trained for Stable "
            "Diffusion 1.x and 2.x"
        )
    kinds = torch.nn.Linear | torch.nn.Conv2d
    names = [f".{name}" for name, m in pipe.unet.named_modules() if isinstance(m, kinds)]
    lacking = [t for t in target_modules if not any(name.endswith(f".{t}") for name in names)]
    if lacking or not target_modules:
        raise ValueError(
            f"adapter.lora.target_modules={list(target_modules)}: the UNet has no linear layer "
            f"named {', '.join(lacking) or '(none given)'}; those of its attention are to_q, "
            "to_k, to_v, to_out.0"
        )
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = sorted(target_modules)
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, bias="none")
        pipe.unet.add_adapter(lora)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()  # its layers have no dropout
    return [p for p in pipe.unet.parameters() if p.requires_grad]


def save_adapter(path: str | Path, pipe: DiffusionPipeline) -> None:
    """Write the LoRA layers of the UNet, with their rank and alpha, in diffusers' format; either a
    whole file or none."""
    settings = pipe.unet.peft_config["default"].to_dict()
    # sorted lists, because sets have no fixed order on disk
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    layers = get_peft_model_state_dict(pipe.unet)
    state = {k: v.detach().cpu().contiguous() for k, v in layers.items()}
    with whole(path) as temporary:
        StableDiffusionPipeline.save_lora_weights(
            temporary.parent,
            unet_lora_layers=state,
            unet_lora_adapter_metadata=settings,
            weight_name=temporary.name,
        )
        content = temporary.read_bytes()
        temporary.unlink()  # safetensors makes files that only their owner can read
        temporary.write_bytes(_sorted_header(content))


def _sorted_header(content: bytes) -> bytes:
    """A safetensors file with a sorted header. safetensors writes metadata in random order, and
    equal adapters should be equal bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def noise_schedule(pipe: DiffusionPipeline) -> DDPMScheduler:
    """The checkpoint's own schedule for training; ValueError if its target is neither the noise nor
    v."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"adapter.model predicts {kind!r}; training supports epsilon and v_prediction"
        )
    return scheduler
