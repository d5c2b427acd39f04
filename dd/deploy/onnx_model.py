"""A segmenter as an ONNX file, and ONNX Runtime to run it. The only module that imports onnx and
onnxruntime.

The file covers all steps from a resized image to a mask: normalisation, network, logits resized to
the size of the original, argmax. Its metadata describe its inputs and outputs (:func:`metadata`).
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

onnxruntime.disable_telemetry_events()  # otherwise it reports to its makers, on Linux too

FORMAT = "dataset-diffusion segmenter 1"
OPSET = 20
NOISY = "torch.onnx._internal.exporter._registration"  # logs that torchvision is missing


def exported(segmenter: torch.nn.Module, facts: dict[str, str]) -> bytes:
    """The ONNX file of a segmenter on the CPU, with ``facts`` as its metadata. Inputs:
    ``images`` uint8 [batch, 3, height, width], RGB; ``size`` int64 [2], height and width of the
    masks. Outputs: ``mask`` uint8 [batch, *size], ``logits`` float [batch, classes, height,
    width]. Batch, height and width are free. ValueError if the segmenter does not allow it."""
    free, example = torch.export.Dim.DYNAMIC, torch.zeros(2, 3, 128, 160, dtype=torch.uint8)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                segmenter.float().eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: free, 2: free, 3: free},),
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
                external_data=False,
            )
    except Exception as error:  # any code of torch, mmsegmentation or transformers may fail here
        raise ValueError(
            f"{type(segmenter).__name__} cannot be exported with a free number and size of "
            "images: its code depends on their values. DeepLabV3, SegFormer, EoMT and those "
            f"on DINO can. torch.onnx says: {_why(error)}"
        ) from error
    model = program.model_proto
    _add_mask(model)
    helper.set_model_props(model, {"format": FORMAT, **facts})
    onnx.checker.check_model(model)
    return model.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of torch's own export, and its message about torchvision."""
    logger = logging.getLogger(NOISY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        logger.setLevel(level)


def _why(error: BaseException) -> str:
    """The first cause that torch's exporter wraps, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _add_mask(model: onnx.ModelProto) -> None:
    """Append logits -> bilinear to ``size`` (torch's align_corners=False) -> argmax -> uint8."""
    graph = model.graph
    for value in (graph.input[0], graph.output[0]):
        for place, name in ((0, "batch"), (2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[place].dim_param = name
    del graph.value_info[:]  # it holds the former names
    graph.input.append(helper.make_tensor_value_info("size", TensorProto.INT64, [2]))
    node, bilinear = helper.make_node, {"coordinate_transformation_mode": "half_pixel"}
    graph.node.extend(
        [
            node("Shape", ["logits"], ["dd_kept"], start=0, end=2),
            node("Concat", ["dd_kept", "size"], ["dd_sizes"], axis=0),
            node("Resize", ["logits", "", "", "dd_sizes"], ["dd_large"], mode="linear", **bilinear),
            node("ArgMax", ["dd_large"], ["dd_ids"], axis=1, keepdims=0),
            node("Cast", ["dd_ids"], ["mask"], to=TensorProto.UINT8),
        ]
    )
    shape = ["batch", "mask_height", "mask_width"]
    graph.output.insert(0, helper.make_tensor_value_info("mask", TensorProto.UINT8, shape))


def metadata(file: str | Path) -> dict[str, str]:
    """The metadata of a file of :func:`exported`; ValueError for any other file."""
    try:
        found = {p.key: p.value for p in onnx.load(file, load_external_data=False).metadata_props}
    except Exception as error:  # any error of protobuf for bytes that are not ONNX
        raise ValueError(f"{file} is not an ONNX file ({type(error).__name__})") from None
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{file} is an ONNX file, but not one of this package (its metadata lack "
            f"format={FORMAT!r})"
        )
    return found


class Session:
    """ONNX Runtime on the CPU. ``model``: the bytes of a file or its path; ``threads``: None = as
    many as torch."""

    def __init__(self, model: bytes | str | Path, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 4
        given = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(
            given, options, providers=["CPUExecutionProvider"]
        )
        told = self.session.get_modelmeta().custom_metadata_map
        self.facts: dict[str, Any] = {
            k: json.loads(v) if v[:1] in "[{" else v for k, v in told.items()
        }

    def __call__(self, images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Masks uint8 [B, *size] of resized images uint8 [B, 3, h, w]. ValueError if the network
        does not accept them."""
        try:
            inputs = {"images": images, "size": np.array(size, np.int64)}
            return self.session.run(["mask"], inputs)[0]
        except Exception as error:  # onnxruntime's errors have no common class
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the exported network does not take images of shape {list(images.shape)}: {why}"
            ) from error
