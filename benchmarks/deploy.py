"""What an exported segmenter gains: PyTorch and ONNX Runtime side by side on the CPU, turn by turn,
in images per second.

    python -m benchmarks.deploy [--run FOLDER | --depth 18 --base-channels 32] [--size 128] [--batch
    1] [--turns 10]

Without a run: a DeepLabV3 with random weights, which is as fast. Both get the same resized images
and give masks at that size; resizing the photograph is left out. The median of the turns counts.
The last line is JSON.
"""

import argparse
import json
import statistics
import time
from importlib.metadata import version

import numpy as np
import torch

from benchmarks.machine import machine
from dd import config
from dd.deploy.onnx_model import Session, exported


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", help="a trained run instead of --depth, --base-channels and --classes"
    )
    for name, default in (
        ("depth", 18),
        ("base-channels", 32),
        ("classes", 8),
        ("size", 128),
        ("batch", 1),
        ("turns", 10),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    segmenter, what = chosen(options)
    session = Session(exported(segmenter, {}))
    images = np.random.default_rng(0).integers(
        0, 256, (options.batch, 3, options.size, options.size), dtype=np.uint8
    )
    size = (options.size, options.size)

    def with_torch():
        with torch.inference_mode():
            return segmenter(torch.from_numpy(images)).argmax(1).numpy()

    def with_onnx():
        return session(images, size)

    same = float((with_torch() == with_onnx()).mean())  # the first calls, which are slower
    seconds = {with_torch: [], with_onnx: []}
    for _ in range(options.turns):
        for one, taken in seconds.items():
            start = time.perf_counter()
            one()
            taken.append(time.perf_counter() - start)
    rates = {
        one.__name__[5:]: options.batch / statistics.median(taken) for one, taken in seconds.items()
    }
    ratio = rates["onnx"] / rates["torch"]
    print(
        f"PyTorch {rates['torch']:.2f} images/s, ONNX Runtime {rates['onnx']:.2f} images/s: "
        f"{ratio:.2f} times as many"
    )
    found = {
        "what": what,
        "size": options.size,
        "batch": options.batch,
        "turns": options.turns,
        "pytorch_images_per_second": round(rates["torch"], 3),
        "onnx_images_per_second": round(rates["onnx"], 3),
        "onnx_over_pytorch": round(ratio, 3),
        "same_pixels": round(same, 6),
        "onnxruntime": version("onnxruntime"),
        **machine(),
    }
    print(json.dumps(found))


def chosen(options):
    """(segmenter in evaluation mode, what it is)."""
    if options.run:
        run, segmenter, _ = config.trained_run(options.run)
        return segmenter.eval(), {"weights_sha256": run["weights_sha256"], **run["segmenter"]}
    node = {"depth": options.depth, "base_channels": options.base_channels}
    node = {"_target_": "dd.segmenters.deeplabv3.DeepLabV3", **node, "dilations": [1, 3, 6, 9]}
    run = {"segmenter": node, "taxonomy": {"names": [f"class {i}" for i in range(options.classes)]}}
    return config.segmenter_of(run).eval(), node


if __name__ == "__main__":
    main()
