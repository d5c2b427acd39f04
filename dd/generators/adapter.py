"""LoRA adapters of a pipeline, through peft: low-rank weights that are trained, saved, and
merged into a checkpoint's own."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from dd.store.provenance import read_json, sha256, whole

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DOWN = r"\.(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight$"
UP = r"\.(?:lora_B|lora\.up|lora_linear_layer\.up)\.weight$"
# What a file may hold, as kohya, diffusers and peft name it; anything else would be passed over.
DOWN_IN_FILE = r"(?:\.lora_down|\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)\.weight"
UP_IN_FILE = r"(?:\.lora_up|\.lora_B|[._]lora\.up|\.lora_linear_layer\.up)\.weight"
READ = rf"(?:{DOWN_IN_FILE}|{UP_IN_FILE}|\.alpha)"


@dataclass(frozen=True)
class Adapter:
    """A checked file. ``base_sha256``: hash of the weights it was trained on, None where no
    run.json lies beside it."""

    file: Path
    base_sha256: str | None

    def sha256(self) -> str:
        return sha256(self.file)


def find_adapter(path: str | Path) -> Adapter:
    """The adapter of a run folder or of a file; nothing is loaded yet.

    FileNotFoundError for no such file and for a training that is not finished, ValueError for a
    pickle or another kind.
    """
    given, path = path, Path(path).expanduser()
    made = "train.py experiment=shapes_adapt_generator (or sd_adapt_generator) makes one"
    if path.is_dir():
        file = path / WEIGHTS
        if not file.is_file() and (
            pickles := sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
        ):
            raise ValueError(_pickle(given, f"holds only {', '.join(pickles)}"))
        begun = (path / "settings.json").is_file() and not (path / "run.json").is_file()
        if begun or not file.is_file():
            raise FileNotFoundError(
                f"diffusion.adapter={given}: its training has begun and is not finished; the same "
                "train.py command goes on"
                if begun
                else f"diffusion.adapter={given}: no {WEIGHTS} in this folder; {made}"
            )
        path = file
    if path.suffix in PICKLES:
        raise ValueError(_pickle(given, "is a pickle"))
    if not path.is_file():
        raise FileNotFoundError(f"diffusion.adapter={given}: no such file or folder; {made}")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"diffusion.adapter={given}: expected a run folder or a *.safetensors file"
        )
    run = read_json(path.parent / "run.json") if (path.parent / "run.json").is_file() else {}
    identity = run.get("identity") if isinstance(run, dict) else None
    return Adapter(path, identity.get("base_sha256") if isinstance(identity, dict) else None)


def _pickle(given, what: str) -> str:
    return (
        f"diffusion.adapter={given} {what}, which can run code when loaded; an adapter is a "
        "*.safetensors file"
    )


def merge(pipe, adapter: Adapter, weight: float, base_sha256: str) -> None:
    """Add ``weight`` times the adapter to the pipeline's own weights; nothing of it stays beside
    them, so that every option of speed and the reading of the attention find the layers that they
    know.

    ValueError for an adapter of another base model, one whose layers or shapes do not fit, a
    damaged or unreadable one.
    """
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not math.isfinite(weight)
        or weight < 0
    ):
        raise ValueError(
            f"diffusion.adapter_weight={weight!r}: expected a finite number of 0 or more (1 = as "
            "trained)"
        )
    if adapter.base_sha256 is not None and adapter.base_sha256 != base_sha256:
        raise ValueError(
            f"diffusion.adapter={adapter.file} was trained on other weights (sha256 "
            f"{adapter.base_sha256[:12]}...) than those "
            f"of diffusion.model (sha256 {base_sha256[:12]}...). Give the model that its run.json "
            "names, or adapt this one. "
            "The same weights in another precision have another hash: copy the file alone "
            "elsewhere to use them"
        )
    try:
        with safe_open(adapter.file, "pt") as file:
            written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_written(written, adapter.file)
        state, _, _ = pipe.lora_state_dict(
            str(adapter.file), unet_config=pipe.unet.config, return_lora_metadata=True
        )
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"diffusion.adapter={adapter.file} cannot be read as LoRA weights: {error!s:.300}"
        ) from None
    lost = sum(
        bool(re.search(f"{kind}$", name)) for name in written for kind in (DOWN_IN_FILE, UP_IN_FILE)
    ) - len(state)
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
    pipe.unload_lora_weights()  # what was merged stays


def _check_written(written: dict, file: Path) -> None:
    """ValueError for a file that holds something that would not be merged, or numbers that are
    none."""
    strange = [name for name in written if not re.search(f"{READ}$", name)]
    if strange:
        kinds = {
            "dora_scale": "DoRA",
            "magnitude": "DoRA",
            "hada": "LoHa",
            "lokr": "LoKr",
            "lora_mid": "LoCon with a middle",
        }
        what = next(
            (f" ({kind})" for part, kind in kinds.items() if any(part in name for name in strange)),
            "",
        )
        raise ValueError(
            f"{len(strange)} of its {len(written)} tensors are no part of a LoRA{what} and would "
            "be left out: "
            f"{', '.join(strange[:3])}. Merge it with the tool that made it"
        )
    if any(name.startswith("base_model.") for name in written):
        raise ValueError(
            "its layers have peft's own names (base_model.model. ...): load it there, and save it "
            "with diffusers' "
            "save_lora_weights, or put unet. in place of base_model.model."
        )
    wrong = [name for name, tensor in written.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of its {len(written)} tensors hold numbers that are not finite, such "
            f"as {wrong[0]}"
        )


def _layer_name(pipe, key: str) -> str:
    """``unet.<layer>.lora....weight`` in the names of the pipeline's own layers, from what
    diffusers makes of a file."""
    part, _, name = key.partition(".")
    name = name.replace(".processor.", ".")
    if part == "unet":
        name = re.sub(r"\.(to_[qkv]|to_out)_lora\.", r".\1.lora.", name).replace(
            ".to_out.lora.", ".to_out.0.lora."
        )
    else:
        name = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora.", name)
        if not hasattr(getattr(pipe, part, None), "text_model"):  # transformers took this level out
            name = name.removeprefix("text_model.")
    return f"{part}.{name}"


def _check_fit(pipe, state: dict, file: Path) -> list[str]:
    """Parts of the pipeline that the adapter changes; ValueError for layers that are not there
    or of another size, which diffusers passes over with a line in a log."""
    parts, wrong = set(), []
    for key, tensor in state.items():
        name = _layer_name(pipe, key)
        found = re.fullmatch(
            rf"(unet|text_encoder|text_encoder_2)\.(.+?)({DOWN[:-1]}|{UP[:-1]})", name
        )
        part = getattr(pipe, found[1], None) if found else None
        try:
            layer = part.get_submodule(found[2]).weight if part is not None else None
        except AttributeError:
            layer = None
        if layer is None:
            wrong.append(f"{key}: no such layer")
            continue
        down = re.search(DOWN, name) is not None
        if (
            tensor.shape[down] != layer.shape[down]
        ):  # down [rank, in], up [out, rank]; weight [out, in]
            wrong.append(f"{key}: {tuple(tensor.shape)} for a layer of {tuple(layer.shape)}")
        parts.add(found[1])
    if wrong or not parts:
        shown = "; ".join(wrong[:3]) or "it is empty"
        raise ValueError(
            f"diffusion.adapter={file} does not fit diffusion.model: {len(wrong)} of its "
            f"{len(state)} tensors: {shown}. "
            "It may be of another kind of model (1.x, 2.x and XL have other layers and sizes), or "
            "of another method: LoRA on "
            "linear and convolution layers of the UNet and the text encoders can be read"
        )
    return sorted(parts)


def add_lora(
    pipe, rank: int, alpha: float, target_modules: list[str], seed: int, checkpointing: bool = False
) -> list:
    """Put fresh LoRA layers (which change nothing yet) into the UNet and freeze everything else;
    their parameters, in the UNet's order. ValueError for XL, which training does not know, and
    for target modules that the UNet lacks."""
    if type(pipe) is not StableDiffusionPipeline:
        raise ValueError(
            f"adapter.model is a {type(pipe).__name__}; adapters are trained for Stable "
            "Diffusion 1.x and 2.x"
        )
    names = {
        name
        for name, m in pipe.unet.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    lacking = [t for t in target_modules if not any(f".{name}".endswith(f".{t}") for name in names)]
    if lacking or not target_modules:
        raise ValueError(
            f"adapter.lora.target_modules={list(target_modules)}: the UNet has no linear layer "
            "named "
            f"{', '.join(lacking) or '(none given)'}; those of its attention are to_q, to_k, "
            "to_v, to_out.0"
        )
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(target_modules), bias="none")
        )
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()  # its layers have no dropout
    return [p for p in pipe.unet.parameters() if p.requires_grad]


def save_adapter(path: str | Path, pipe) -> None:
    """Write the LoRA layers of the UNet, with their rank and alpha, in diffusers' format; a
    whole file or none."""
    settings = pipe.unet.peft_config["default"].to_dict()
    settings = {
        k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()
    }  # sets have no order on disk
    state = {
        k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(pipe.unet).items()
    }
    with whole(path) as temporary:
        StableDiffusionPipeline.save_lora_weights(
            temporary.parent,
            unet_lora_layers=state,
            unet_lora_adapter_metadata=settings,
            weight_name=temporary.name,
        )
        content = temporary.read_bytes()
        temporary.unlink()  # safetensors makes files for their owner alone
        temporary.write_bytes(_sorted_header(content))


def _sorted_header(content: bytes) -> bytes:
    """A safetensors file with its header in order: safetensors writes metadata in a random one,
    and equal adapters are to be equal bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def noise_schedule(pipe) -> DDPMScheduler:
    """The checkpoint's own schedule for training; ValueError for a target that is neither the
    noise nor v."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"adapter.model predicts {kind!r}; training knows epsilon and v_prediction"
        )
    return scheduler
