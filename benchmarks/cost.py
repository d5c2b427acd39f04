"""GPU-hours, disk and price of the paper's two reproductions, computed from the models' own
operation counts.

    python -m benchmarks.cost [--tflops 100] [--float32 0.5] [--gpus 8] [--price 2]

Nothing is run: the models are built without weights (meta device) at their published sizes and
their multiplications are counted by torch, those of reading the attention too. The assumptions:
``--tflops`` is what a GPU sustains on such models in half precision (an A100's peak is 312; a third
of the peak is what convolutions and attention of this size usually reach), ``--float32`` the share
of it that is left in float32, in which segmenters are trained (an A100's peak there is 156, with
the TF32 convolutions that are PyTorch's default). ``--price``: of a GPU-hour, a placeholder for
your own. The last line is JSON.
"""

import argparse
import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import UNETS, VAE
from benchmarks.reading import recorder_of
from dd.segmenters.deeplabv3 import DeepLabV3

SETS = {
    "voc": (40_000, 20_000, 21, 1.4),
    "coco": (80_000, 40_000, 81, 2.0),
}  # images, iterations, outputs, classes per image
STEPS, FAST, BATCH, HEAT_BYTES, POWERS, JPEG_BYTES = 100, 25, 8, 32 * 32 * 4, 9, 110_000


def tera(run) -> float:
    """10^12 operations (two per multiplication) of one call on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tflops", type=float, default=100, help="sustained TFLOP/s of one GPU in half precision"
    )
    parser.add_argument("--float32", type=float, default=0.5, help="share of --tflops in float32")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--price", type=float, default=2, help="of a GPU-hour")
    options = parser.parse_args()
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNETS["sd21"]).eval(), AutoencoderKL(**VAE).eval()
        latents, text = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 1024)
        step = tera(lambda: unet(latents, torch.tensor(0, device="meta"), text))
        decode = tera(lambda: vae.decode(latents))
        with recorder_of(unet, text, 16, 32):
            capture = tera(lambda: unet(latents, torch.tensor(0, device="meta"), text)) - step
    parameters = sum(p.numel() for p in unet.parameters())
    images_of = {
        n: n * (2 * step + capture) + decode for n in (STEPS, FAST)
    }  # guidance: each step sees the image twice
    print(
        f"SD 2.1 base: UNet of {parameters / 1e6:.1f} M parameters; TFLOP: {step:.3f} a call, "
        f"{decode:.2f} to decode"
    )
    print(
        f"reading the attention: {capture:.4f} TFLOP a step, {100 * capture / (2 * step):.1f} % "
        "of a step"
    )
    print(
        "; ".join(
            f"an image of {n} steps with guidance: {tflop:.0f} TFLOP"
            for n, tflop in images_of.items()
        )
    )
    result = {**vars(options), "unet_tflop": step}
    result |= {"capture_tflop": capture, "image_tflop": images_of, "sets": {}}
    for name, (images, iterations, outputs, classes) in SETS.items():
        hours = {
            f"generate, {n} steps": images * tflop / options.tflops / 3600
            for n, tflop in images_of.items()
        }
        for depth in (50, 101):
            segmenter = DeepLabV3(outputs, depth=depth).to("meta").eval()
            forward = tera(lambda s=segmenter: s(torch.empty(1, 3, 512, 512, device="meta")))
            operations = 3 * forward * BATCH * iterations  # backward: twice the forward
            hours[f"train R{depth}"] = operations / (options.tflops * options.float32) / 3600
        disk = images * (JPEG_BYTES + classes * POWERS * HEAT_BYTES + 5_000) / 2**30
        result["sets"][name] = {"gpu_hours": hours, "disk_gib": disk}
        print(f"{name}: {images} images")
        for part, value in hours.items():
            on_all, price = value / options.gpus, value * options.price
            print(
                f"  {part:20s} {value:7.1f} GPU-hours, {on_all:6.1f} h on {options.gpus} GPUs, "
                f"price {price:7.0f}"
            )
        print(f"  disk                 {disk:7.1f} GiB of images, heat and masks")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
