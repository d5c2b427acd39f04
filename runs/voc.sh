#!/usr/bin/env bash
# The paper's VOC table: prompts -> 40,000 images with masks -> three segmenters -> mIoU on VOC 2012 val, beside the published
# figures in outputs/voc/report.html. Finished parts are skipped when it is run again.
#   MODEL=/models/sd21-base bash runs/voc.sh        (or a hub id with REVISION=<commit>)
# Copies of the data that are there: VOC=/data/VOCdevkit/VOC2012 SBD=/data/benchmark_RELEASE/dataset
# Cost by operation count at 100 TFLOP/s: 18 GPU-hours for the images; each DeepLabV3 1.4 (R50)
# or 1.9 (R101). docs/reproduce.md
# Expected mIoU, synthetic only: R50 61.6, R101 64.8, Mask2Former R50 60.2. Nobody has reproduced 64.8 in public yet.
# The published few-shot lists: LISTS=<folder of 92.txt, 183.txt, 366.txt, 732.txt> (docs/budget.md)
# First: PILOT=200 draws so many images, tells what the 40,000 would cost, and says go or stop (exit code 1).
# Further masks of the same images, a row each: CALIBRATE=50 (50 labels choose the mask settings), SAM2=, SAM3= (weights).
# Shorter: SEEDS=0 SEGMENTERS=deeplabv3_r101 SHOTS=92. GENERATE and TRAIN hold further overrides,
# as TRAIN="trainer.devices=2".
source "$(dirname "$0")/setup.sh"
SHOTS=${SHOTS:-92,183,366,732}; TOTAL=24000    # 20,000 synthetic and 4,000 real iterations

link "${VOC:-}" "$DATA/VOCdevkit/VOC2012"
link "${SBD:-}" "$DATA/SBD"
python -m dd prepare voc --root "$DATA"
python -m dd prepare voc_aug --root "$DATA"
python generate.py experiment=voc stage=caption caption.images="$DATA/VOCdevkit/VOC2012/JPEGImages" data_root="$DATA" $GENERATE
if [ -n "${PILOT:-}" ]; then
  python generate.py experiment=voc name=voc_pilot num_images="$PILOT" diffusion.model="$MODEL" \
    diffusion.revision="${REVISION:-null}" data_root="$DATA" $GENERATE
  exec python evaluate.py stage=pilot synthetic="$DATA/synthetic/voc_pilot" pilot.images=40000
fi
python generate.py experiment=voc diffusion.model="$MODEL" diffusion.revision="${REVISION:-null}" data_root="$DATA" $GENERATE
data=voc folder=VOC2012 whole=voc_aug; source runs/table.sh
