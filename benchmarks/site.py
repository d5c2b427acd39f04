"""What each step without labels gains on the embedded example site: the runs of runs/site.sh -> benchmarks/results/site.json.

    python -m benchmarks.site [--outputs outputs]

mIoU on the test images of shapes_shift for each arm and seed; arms whose runs are not there are left out.
"""

import argparse
import json
from pathlib import Path

from benchmarks.machine import machine
from dd.provenance import read_json, write_json

SITE = "shapes_shift"
RESULT = Path(__file__).parent / "results" / "site.json"
ARMS = {  # name: (real labels, folder below outputs, runs of all seeds)
    "synthetic only": ("0", "shapes/synthetic/seed=*"),
    "batch-norm statistics of the site": ("0", "site/batch_norm/seed=*"),
    "colour style of the site": ("0", "site/style_color/seed=*"),
    "Fourier style of the site": ("0", "site/style_fourier/seed=*"),
    "self-training on photographs": ("0", "site/segmenter_alone/seed=*"),
    "adapted generator": ("0", "site/generator/seed=*"),
    "adapted generator, as many steps more": ("0", "site/longer/seed=*"),
    "adapted generator, self-training": ("0", "site/segmenter/seed=*"),
    "adapted generator, self-training, as many steps more as with labels": ("0", "site/segmenter_longer/seed=*"),
    "adapted generator, self-training, 16 labels at random": ("16", "site/labels_16/seed=*"),
    "adapted generator, self-training, 16 labels of the queue": ("16", "site/labels_queue/seed=*"),
    "adapted generator, self-training, 64 labels at random": ("64", "site/labels_64/seed=*"),
    "16 labels only": ("16", "shapes/real_shapes_shift/shots=16,seed=*"),
    "64 labels only": ("64", "shapes/real_shapes_shift/shots=64,seed=*"),
    "all labels only": ("768", "shapes/real_shapes_shift/shots=all,seed=*"),
}


def collect(outputs: Path) -> dict:
    """{arm: {"labels", "miou": {seed: mIoU}, "seconds": of training, by seed}}."""
    found = {}
    for arm, (labels, pattern) in ARMS.items():
        runs = {}
        for folder in sorted(outputs.glob(pattern)):
            path, run = folder / "eval" / SITE / "metrics.json", read_json(folder / "run.json")
            if path.is_file():
                measured = read_json(path)
                assert measured["checkpoint_sha256"] == run["checkpoint_sha256"], f"{path} is of another training"
                runs[str(run["trained_on"]["seed"])] = (measured["miou"], run["seconds"])
        if runs:
            miou, seconds = ({seed: round(r[i], 2) for seed, r in sorted(runs.items())} for i in (0, 1))
            found[arm] = {"labels": labels, "miou": miou, "seconds": seconds}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    arms = collect(parser.parse_args().outputs)
    write_json(RESULT, {"site": SITE, "arms": arms, **machine()})
    print(json.dumps(arms, indent=1))


if __name__ == "__main__":
    main()
