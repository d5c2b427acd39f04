"""Adapters of other programs: what is merged is W + weight * alpha / rank * B A in every layer,
or it is refused."""

import pytest
import torch
from safetensors.torch import save_file

from dd.generators import TextToImage

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RANK, ALPHA = 4, 2.0


def layers(pipe, parts):
    """{(part, name): layer} of the attention's queries and keys and of every linear layer of
    text encoders."""
    ends = {
        part: ("attn2.to_q", "attn2.to_k", "attn2.to_out.0") if part == "unet" else TEXT
        for part in parts
    }
    return {
        (p, n): m for p in parts for n, m in getattr(pipe, p).named_modules() if n.endswith(ends[p])
    }


def kohya(part, name):
    """As kohya's scripts name it; text_model is a level that transformers has taken out."""
    te = {"text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    return (
        {"unet": "lora_unet_", **te}[part] + name.removeprefix("text_model.").replace(".", "_"),
        "lora_down",
        "lora_up",
    )


def kohya_xl(part, name):
    key, *ends = kohya(part, name)
    return key.replace("lora_te_", "lora_te1_"), *ends


def diffusers(part, name):
    level = "" if part == "unet" or name.startswith("text_model.") else "text_model."
    return (
        f"{part}.{level}{name}",
        "lora_linear_layer.down" if part != "unet" else "lora.down",
        ("lora_linear_layer.up" if part != "unet" else "lora.up"),
    )


def old(part, name):
    """As the first versions of diffusers: processors of the UNet, to_q_lora in the text encoder."""
    if part == "unet":
        block, last = name.replace(".to_out.0", ".to_out").rsplit(".", 1)
        return f"unet.{block}.processor.{last}_lora", "down", "up"
    block, last = name.rsplit(".", 1)
    return f"{part}.text_model.{block}.to_{last.removesuffix('_proj')}_lora", "down", "up"


def adapter(found, names, alpha=True):
    """(state of a file, {(part, name): what it adds})."""
    generator, state, change = torch.Generator().manual_seed(0), {}, {}
    for (part, name), layer in found.items():
        key, down_end, up_end = names(part, name)
        rows, columns = layer.weight.shape
        down, up = (
            torch.randn(*s, generator=generator) * 0.05 for s in ((RANK, columns), (rows, RANK))
        )
        state |= {f"{key}.{down_end}.weight": down, f"{key}.{up_end}.weight": up}
        if alpha:
            state[f"{key}.alpha"] = torch.tensor(ALPHA)
        change[part, name] = (ALPHA / RANK if alpha else 1) * up @ down
    return state, change


def weights(model, found):
    return {
        (p, n): getattr(model.pipe, p).get_submodule(n).weight.detach().clone() for p, n in found
    }


@pytest.mark.parametrize(
    ("kind", "names", "parts", "alpha"),
    [
        ("sd", kohya, ("unet",), True),
        ("sd", kohya, ("unet", "text_encoder"), True),
        ("sd", kohya, ("text_encoder",), True),
        ("sd", diffusers, ("unet", "text_encoder"), False),
        ("sd", old, ("unet", "text_encoder"), False),
        ("xl", kohya_xl, ("unet", "text_encoder", "text_encoder_2"), True),
        ("xl", diffusers, ("unet", "text_encoder", "text_encoder_2"), False),
    ],
)
def test_layers_of_the_unet_and_of_text_encoders(folders, tmp_path, kind, names, parts, alpha):
    plain = TextToImage(model=str(folders[kind]))
    found = layers(plain.pipe, parts)
    if names is old:
        found = {key: layer for key, layer in found.items() if "fc" not in key[1]}
    state, change = adapter(found, names, alpha)
    save_file(state, tmp_path / "a.safetensors")
    before = weights(plain, found)
    made = TextToImage(
        model=str(folders[kind]), adapter=str(tmp_path / "a.safetensors"), adapter_weight=0.5
    )
    after = weights(made, found)
    assert len(change) >= 4
    for key in found:
        assert torch.allclose(after[key] - before[key], 0.5 * change[key], atol=1e-6), key
    for part in (
        "unet",
        "text_encoder",
        "text_encoder_2",
    ):  # nothing of the adapter stays beside the weights
        module = getattr(made.pipe, part, None)
        assert module is None or not [n for n, _ in module.named_modules() if "lora" in n]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda k: {f"{k}.dora_scale": torch.ones(1, 8)},
            r"1 of its \d+ tensors are not part of a LoRA \(DoRA\)",
        ),
        (lambda k: {f"{k}.lora_mid.weight": torch.ones(4, 4)}, r"LoRA \(LoCon with a middle\)"),
        (lambda k: {f"{k}.hada_w1_a": torch.ones(4, 4)}, r"LoRA \(LoHa\)"),
        (
            lambda k: {f"{k}.diff_b": torch.ones(4)},
            "are not part of a LoRA and would be left out: .*diff_b",
        ),
        (
            lambda k: {"bundle_emb.word.string_to_param": torch.ones(4)},
            "would be left out: bundle_emb",
        ),
        (
            lambda k: {f"{k}.lora_down.weight": torch.full((4, 16), torch.nan)},
            "hold numbers that are not finite",
        ),
        (
            lambda k: {"base_model.model.mid.lora_A.weight": torch.ones(4, 4)},
            "layers have peft's own names",
        ),
    ],
)
def test_every_tensor_is_used_or_the_file_is_refused(folders, tmp_path, change, message):
    found = layers(TextToImage(model=str(folders["sd"])).pipe, ("unet",))
    state, _ = adapter(found, kohya)
    save_file(state | change(kohya(*next(iter(found)))[0]), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        TextToImage(model=str(folders["sd"]), adapter=str(tmp_path / "a.safetensors"))


def test_an_adapter_of_another_kind_of_model_is_not_blamed_on_one_cause(folders, tmp_path):
    state, _ = adapter(
        layers(TextToImage(model=str(folders["xl"])).pipe, ("text_encoder_2",)), kohya_xl
    )
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="no such layer.*It may be of another kind of model"
    ) as error:
        TextToImage(model=str(folders["sd"]), adapter=str(tmp_path / "a.safetensors"))
    assert "base model that it was trained on" not in str(error.value)
