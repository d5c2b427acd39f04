"""Reading one layer's attention on a GPU: the fused kernels against the slow path, in milliseconds.

    python -m benchmarks.attention

Medians of triton.testing.do_bench over random queries and keys in float16, each added to a running
sum; and the largest difference between the two. The last line is JSON.
"""

import argparse
import json

import torch
import triton

from benchmarks.machine import machine
from dd.attention import fused
from dd.attention import maths as attention

LAYERS = {  # samples, heads, pixels, keys, width of a head
    "sdxl self 64x64, 2 images": (2, 10, 4096, 4096, 64),
    "sd15 self 32x32, 16 images": (16, 8, 1024, 1024, 80),
    "sd21 self 32x32, 16 images": (16, 10, 1024, 1024, 64),
    "sd15 cross 16x16, 16 images": (16, 8, 256, 77, 160),
    "sdxl cross 32x32, 2 images": (2, 20, 1024, 77, 64),
}


def compare(samples: int, heads: int, pixels: int, keys: int, width: int) -> dict:
    """Milliseconds of both ways, and how far their means are apart."""
    q = torch.randn(samples, heads, pixels, width, device="cuda", dtype=torch.float16)
    k = torch.randn(samples, heads, keys, width, device="cuda", dtype=torch.float16)
    total, scale = torch.zeros(samples, pixels, keys, device="cuda"), width**-0.5

    def slow():
        total.add_(attention.mean_attention_by_heads(q, k, scale))

    def with_kernels():
        fused.mean_attention(q, k, scale, total, add=True)

    fused.mean_attention(q, k, scale, total, add=False)
    difference = (total - attention.mean_attention_by_heads(q, k, scale)).abs().max().item()
    before, after = (
        triton.testing.do_bench(way, return_mode="median") for way in (slow, with_kernels)
    )
    return {
        "slow": round(before, 4),
        "fused": round(after, 4),
        "times": round(before / after, 2),
        "difference": difference,
    }


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "the fused kernels run on a GPU alone; this machine has none that torch can use"
        )
    found = {name: compare(*layer) for name, layer in LAYERS.items()}
    for name, row in found.items():
        print(
            f"{name:28} {row['slow']:8.3f} ms, fused {row['fused']:8.3f} ms, {row['times']:5.1f}x"
        )
    print(json.dumps({"attention": found, **machine("cuda")}))


if __name__ == "__main__":
    main()
