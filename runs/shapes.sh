#!/usr/bin/env bash
# The embedded benchmark in full: three seeds; 16, 64, 256 and all 768 real images of either domain, fine-tuned and as
# controls with equal total steps; ablations of the masks. Writes outputs/shapes/{summary.json,report.html} and
# benchmarks/results/shapes.json. Finished parts are skipped when it is run again.
# Cost: hours on 2 CPU cores, minutes on a GPU. Expected mIoU: see the table in README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0,1,2}
SHOTS=${SHOTS:-16,64,256,all}

python -m dd prepare shapes
python generate.py experiment=shapes
python generate.py experiment=shapes stage=probe probe.split=tune
python generate.py experiment=shapes stage=probe probe.split=tune prompts.append=false
python generate.py experiment=shapes stage=probe probe.split=test

# Main arms. All runs use the learning rates of conf/experiment/; LOG.md says how they came about.
python train.py -m experiment=shapes_synthetic seed=$SEEDS
for domain in shapes shapes_shift; do
  python train.py -m experiment=shapes_finetune data=$domain shots=$SHOTS seed=$SEEDS
  python train.py -m experiment=shapes_real data=$domain shots=$SHOTS seed=$SEEDS
done

# Ablations: other mask sets from the same stored heat, and one data set generated without class-prompt appending.
label() { python generate.py experiment=shapes stage=label mask_set="$1" "${@:2}"; }
label power=1 masks.power=1
label power=2 masks.power=2
label power=4 masks.power=4
label power=8 masks.power=8
label band=off masks.band=0
label attention=full_prompt masks.source=full_prompt
label paper masks=paper
python generate.py experiment=shapes name=shapes_no_append prompts.append=false
for set in power=1 power=2 power=4 power=8 band=off attention=full_prompt paper; do
  python train.py -m experiment=shapes_synthetic name="shapes/ablation/$set/seed=\${seed}" synthetic_masks=masks/$set seed=$SEEDS
done
python train.py -m experiment=shapes_synthetic name="shapes/ablation/append=off/seed=\${seed}" synthetic=data/synthetic/shapes_no_append seed=$SEEDS

for data in shapes shapes_shift; do
  python evaluate.py run="outputs/shapes/*/*seed=*" data=$data
  python evaluate.py run="outputs/shapes/ablation/*/seed=*" data=$data
  python evaluate.py run="outputs/shapes/synthetic/seed=*" data=$data weights=raw
done
# Agreement of the synthetic masks with segmenters trained on all real images.
python evaluate.py stage=audit run="outputs/shapes/real_shapes/shots=all,seed=*"
python evaluate.py stage=report runs=outputs/shapes name=shapes domains=[shapes,shapes_shift]
cp outputs/shapes/summary.json benchmarks/results/shapes.json
