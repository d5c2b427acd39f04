#!/usr/bin/env bash
# The paper's COCO table: prompts -> 80,000 images with masks -> three segmenters -> mIoU on COCO 2017 val (80 things and
# background), beside the published figures in outputs/coco/report.html. Finished parts are skipped when it is run again.
#   MODEL=/models/sd21-base bash runs/coco.sh       (or a hub id with REVISION=<commit>)
# A copy of the data that is there: COCO=/data/coco2017 (annotations, train2017, val2017)
# Cost by operation count at 100 TFLOP/s: 36 GPU-hours for the images; each DeepLabV3 2.9 (R50)
# or 3.7 (R101). docs/reproduce.md
# Expected mIoU, synthetic only: R50 32.4, R101 34.2, Mask2Former R50 31.0.
# First: PILOT=200 draws so many images, tells what the 80,000 would cost, and says go or stop (exit code 1).
# Further masks of the same images, a row each: CALIBRATE=50 (50 labels choose the mask settings), SAM2=, SAM3= (weights).
# Shorter: SEEDS=0 SEGMENTERS=deeplabv3_r101 SHOTS=100. GENERATE and TRAIN hold further overrides.
source "$(dirname "$0")/setup.sh"
SHOTS=${SHOTS:-100,400,1600}; TOTAL=44000      # 40,000 synthetic and 4,000 real iterations

link "${COCO:-}" "$DATA/coco2017"
python -m dd prepare coco --root "$DATA" ${COCO:+--existing "$DATA/coco2017"}
if [ -n "${PILOT:-}" ]; then
  python generate.py experiment=coco name=coco_pilot num_images="$PILOT" diffusion.model="$MODEL" \
    diffusion.revision="${REVISION:-null}" data_root="$DATA" $GENERATE
  exec python evaluate.py stage=pilot synthetic="$DATA/synthetic/coco_pilot" pilot.images=80000
fi
python generate.py experiment=coco diffusion.model="$MODEL" diffusion.revision="${REVISION:-null}" data_root="$DATA" $GENERATE
data=coco folder=coco whole=coco; source runs/table.sh
