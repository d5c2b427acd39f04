"""What a model sees is what the processors of transformers would show it. They need torchvision,
which nothing here does: their settings are read from their source."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import constants

from dd.labelers.pixels import SAM2, SAM3, Look, at_size, seen

MODELS = Path(importlib.util.find_spec("transformers").origin).parent / "models"


def recorded(name):
    """{setting: value} of the class of an image processor, by its source."""
    tree = ast.parse((MODELS / name / f"image_processing_{name}.py").read_text())
    kind = next(
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.ClassDef) and n.name == f"{name.capitalize()}ImageProcessor"
    )
    found = {}
    for line in kind.body:
        if isinstance(line, ast.Assign):
            found[line.targets[0].id] = ast.unparse(line.value)
    return found


@pytest.mark.parametrize(("name", "look"), [("sam2", SAM2), ("sam3", SAM3)])
def test_the_look_is_that_of_the_processor(name, look):
    known = recorded(name)
    assert ast.literal_eval(known["size"]) == {"height": look.side, "width": look.side}
    assert list(look.mean) == getattr(constants, known["image_mean"])
    assert list(look.std) == getattr(constants, known["image_std"])
    assert known["resample"] == "PILImageResampling.BILINEAR"
    assert known["do_resize"] == known["do_rescale"] == known["do_normalize"] == "True"
    assert known["pad_size"] == "None"


def default(name, function, argument):
    """A default of a method of an image processor."""
    tree = ast.parse((MODELS / name / f"image_processing_{name}.py").read_text())
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    names = [a.arg for a in found.args.args]
    return ast.literal_eval(found.args.defaults[names.index(argument) - len(names)])


def test_thresholds_are_those_of_the_processors():
    from dd.labelers.sam3 import TOKENS, Sam3Settings

    assert default("sam2", "post_process_masks", "mask_threshold") == 0.0
    known = Sam3Settings(model="a")
    assert default("sam3", "post_process_instance_segmentation", "threshold") == known.score
    assert default("sam3", "post_process_instance_segmentation", "mask_threshold") == known.mask
    source = (MODELS / "sam3/processing_sam3.py").read_text()
    assert f'padding="max_length", max_length={TOKENS})' in source


def test_an_image_is_squashed_rounded_and_normalised():
    image = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    look = Look(32, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    shown = seen([image], look)
    assert shown.shape == (1, 3, 32, 32) and shown.dtype == torch.float32
    values = shown[0] * torch.tensor(look.std).view(3, 1, 1)
    values = (values + torch.tensor(look.mean).view(3, 1, 1)) * 255
    assert torch.allclose(values, values.round(), atol=1e-3)  # whole, as uint8 is
    # Pillow's antialiased bilinear is another implementation of the same filter
    pillow = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(values.permute(1, 2, 0).numpy() - pillow).max() <= 1.01
    same = seen([image[:32, :32]], look)[0, 0] * 0.5 + 0.1
    assert torch.allclose(same * 255, torch.from_numpy(image[:32, :32, 0].astype(np.float32)))


def test_masks_come_back_bilinearly():
    mask = torch.tensor([[[-1.0, 1.0]]])
    assert at_size(mask, (1, 4)).tolist() == [[[-1.0, -0.5, 0.5, 1.0]]]
    assert at_size(torch.zeros(0, 4, 4), (3, 5)).shape == (0, 3, 5)
