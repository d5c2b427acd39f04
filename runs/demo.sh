#!/usr/bin/env bash
# The embedded benchmark once: generate -> label -> train on synthetic images -> fine-tune on 16 real ones, and the control on
# the same 16 alone (equal total steps) -> mIoU on the test splits of both domains -> outputs/shapes/report.html.
# Cost: 22 minutes on 2 CPU cores, with the installation. Interrupted and run again, it goes on where
# it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

python -m dd prepare shapes
python generate.py experiment=shapes
python evaluate.py experiment=shapes stage=probe probe.split=test
python train.py experiment=shapes_synthetic
python train.py experiment=shapes_finetune shots=16
python train.py experiment=shapes_real shots=16
for data in shapes shapes_shift; do
  python evaluate.py run="outputs/shapes/*/*seed=0" data=$data
done
python evaluate.py stage=report report.runs=outputs/shapes name=shapes report.domains=[shapes,shapes_shift]
