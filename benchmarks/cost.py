"""GPU-hours and disk of the paper's two reproductions, computed from the models' own operation counts.

    python benchmarks/cost.py [--tflops 100] [--gpus 8]

Nothing is run: the models are built without weights (meta device) at their published sizes and their multiplications are
counted by torch. ``--tflops`` is the one assumption: what a GPU sustains on such models in half precision (an A100's peak
is 312; a third of the peak is what convolutions and attention of this size usually reach). The last line is JSON.
"""

import argparse
import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from dd.segmenters.mmsegmentation import DeepLabV3

SD21_UNET = {  # Stable Diffusion 2.1 base, 865.9 M parameters
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
SETS = {"voc": (40_000, 20_000, 21, 1.4), "coco": (80_000, 40_000, 81, 2.0)}  # images, iterations, outputs, classes per image
STEPS, BATCH, HEAT_BYTES, POWERS, JPEG_BYTES = 100, 8, 32 * 32 * 2, 9, 110_000


def tera(run) -> float:
    """10^12 operations (two per multiplication) of one call on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=100, help="sustained TFLOP/s of one GPU in half precision")
    parser.add_argument("--gpus", type=int, default=8)
    options = parser.parse_args()
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD21_UNET).eval(), AutoencoderKL(**SD_VAE).eval()
        latents, text = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 1024)
        step = tera(lambda: unet(latents, torch.tensor(0, device="meta"), text))
        decode = tera(lambda: vae.decode(latents))
    parameters = sum(p.numel() for p in unet.parameters())
    image = 2 * STEPS * step + decode  # guidance: each step sees the image twice
    print(f"SD 2.1 base: UNet of {parameters / 1e6:.1f} M parameters; TFLOP: {step:.3f} a call, {decode:.2f} to decode")
    print(f"an image of {STEPS} steps with guidance: {image:.0f} TFLOP")
    result = {"tflops": options.tflops, "gpus": options.gpus, "unet_tflop": step, "image_tflop": image, "sets": {}}
    for name, (images, iterations, outputs, classes) in SETS.items():
        hours = {"generate": images * image / options.tflops / 3600}
        for depth in (50, 101):
            segmenter = DeepLabV3(outputs, depth).to("meta").eval()
            forward = tera(lambda s=segmenter: s(torch.empty(1, 3, 512, 512, device="meta")))
            hours[f"train_r{depth}"] = 3 * forward * BATCH * iterations / options.tflops / 3600  # backward: twice the forward
        disk = images * (JPEG_BYTES + classes * POWERS * HEAT_BYTES + 5_000) / 2**30
        result["sets"][name] = {"gpu_hours": hours, "disk_gib": disk}
        print(f"{name}: {images} images")
        for part, value in hours.items():
            print(f"  {part:10s} {value:7.1f} GPU-hours, {value / options.gpus:6.1f} h on {options.gpus} GPUs")
        print(f"  disk       {disk:7.1f} GiB of images, heat and masks")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
