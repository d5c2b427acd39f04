#!/usr/bin/env bash
# Whose masks, which student: the embedded set's images labelled in several ways, and several
# segmenters trained on each of the mask sets, equal steps. Table: outputs/labelers/report.html
# ("Whose masks, which student"); the sets compared pair by pair: data/synthetic/shapes/agreement/.
#   paper      the paper's chain                                           supervision A
#   default    masks=refined                                               A
#   run_16     what a segmenter of 16 real images sees (real images' recipe)    by its teacher
#   joined     where default and run_16 agree; elsewhere 255               the strongest of both
#   run_all    the same of all real images: as good as masks of these images get here
# and each student on all real images with their exact masks, the ceiling.
# SAM2 and SAM3 (a folder, or a hub id with SAM2_REVISION, SAM3_REVISION) add rows of class D.
# Each student's learning rate is found on synthetic images held out, without a label.
# Cost: 5 + 1 trainings of 320 steps for each student and seed, and 6 for each search; not measured.
# Shorter: SEEDS=0 STUDENTS=deeplabv3 STEPS=180. Finished parts are skipped when it is run again.
set -euo pipefail
for name in SAM2 SAM3; do    # a path is meant from where you stand
  if [ -e "${!name:-}" ]; then printf -v "$name" %s "$(realpath "${!name}")"; fi
done
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2}
STUDENTS=${STUDENTS:-deeplabv3 segformer vit}
STEPS=${STEPS:-320}

# All from random weights. The vision transformer: DINOv2's, small, with DPT's head.
student() {
  case $1 in
    segformer) echo segmenter=segformer segmenter.pretrained=null segmenter.sync_bn=false ;;
    vit) echo segmenter=dinov2_dpt segmenter.pretrained=null segmenter.sync_bn=false segmenter.hidden_size=192 \
      segmenter.layers=8 segmenter.heads=3 segmenter.patch_size=8 segmenter.image_size=128 segmenter.channels=64 ;;
    deeplabv3) ;;
    *) echo "STUDENTS: no student $1; there are deeplabv3, segformer, vit" >&2; return 1 ;;
  esac
}
label() { python generate.py experiment=shapes stage=label mask_set="$1" "${@:2}"; }

python -m dd prepare shapes
python generate.py experiment=shapes
label paper masks=paper
for shots in 16 all; do
  python train.py experiment=shapes_real shots=$shots
  label run_$shots labeler=run labeler.run="outputs/shapes/real_shapes/shots=$shots,seed=0"
done
label joined labeler=joined labeler.sets=[SegmentationClass,masks/run_16]
SETS="SegmentationClass masks/paper masks/run_16 masks/joined masks/run_all"
for name in sam2_refine sam3; do
  model=SAM2; if [ $name = sam3 ]; then model=SAM3; fi
  revision=${model}_REVISION
  if [ -n "${!model:-}" ]; then
    label $name labeler=$name labeler.model="${!model}" labeler.revision="${!revision:-null}"
    SETS="$SETS masks/$name"
  fi
done
for set in $SETS; do
  if [ "$set" != SegmentationClass ]; then
    python evaluate.py experiment=shapes stage=agree agree.a=SegmentationClass agree.b="$set"
  fi
done

for student in $STUDENTS; do
  read -ra model <<<"$(student "$student")"
  search=labelers_search_$student
  python train.py stage=search search.space=learning_rate search.trials=6 experiment=shapes_synthetic "${model[@]}" \
    name="$search" hold_out=64 trainer.max_steps="$STEPS" trainer.limit_val_batches=1.0 trainer.val_check_interval="$STEPS"
  mapfile -t found < <(sed -n 's/^- //p' "outputs/$search/best.yaml")
  for seed in $SEEDS; do
    for set in $SETS; do
      python train.py experiment=shapes_synthetic "${model[@]}" "${found[@]}" trainer.max_steps="$STEPS" seed="$seed" \
        synthetic_masks="$set" name="labelers/$student/$(basename "$set")/seed=$seed"
    done
    python train.py experiment=shapes_real shots=all "${model[@]}" "${found[@]}" trainer.max_steps="$STEPS" seed="$seed" \
      name="labelers/$student/real/seed=$seed"
  done
done
for data in shapes shapes_shift; do
  python evaluate.py run="outputs/labelers/*/*/seed=*" data=$data
done
python evaluate.py stage=report report.runs=outputs/labelers name=labelers report.domains=[shapes,shapes_shift]
