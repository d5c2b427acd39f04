# The part that VOC and COCO share, sourced by runs/voc.sh and runs/coco.sh, which set data, folder (the name of its
# images' folder), whole (all real images to train on), DATA, SHOTS, TOTAL, MODEL, GENERATE and TRAIN.
SEEDS=${SEEDS:-0,1,2}
# deeplabv3_r<depth>, or a choice of the group segmenter; folders are named after them
SEGMENTERS=${SEGMENTERS:-deeplabv3_r50,deeplabv3_r101,mask2former_r50}
few_list=()    # published few-shot lists: a file for each of SHOTS
if [ -n "${LISTS:-}" ]; then few_list=(shots_list="$LISTS/\${shots}.txt"); fi
PAPER_TTA='scales=[0.5,0.75,1,1.25,1.5,1.75] flip=true'

# train <recipe> <segmenter> [overrides]: all seeds, one folder each
train() {
  local model=(segmenter="$2")
  case $2 in deeplabv3_r*) model=(segmenter=deeplabv3 segmenter.depth="${2##*_r}") ;; esac
  python train.py -m experiment="paper_$1" "${model[@]}" seed="$SEEDS" data_root="$DATA" "${@:3}" $TRAIN
}
# score <folder>: single scale, then the paper's test-time augmentation in a folder below
score() {
  python evaluate.py run="outputs/$1/*" data="$data" data_root="$DATA"
  python evaluate.py run="outputs/$1/*" data="$data" data_root="$DATA" $PAPER_TTA
}

# Further mask sets of the same images, each a row of its own beside the paper's masks: settings chosen by CALIBRATE labelled
# training images (class B); SAM 2 from SAM2, SAM 3 from SAM3 (a folder, or a hub id with SAM2_REVISION, SAM3_REVISION; class
# D). docs/labelers.md
sets=()
relabel() { python generate.py experiment="$data" stage=label mask_set="$1" data_root="$DATA" "${@:2}"; sets+=("$1"); }
if [ -n "${CALIBRATE:-}" ]; then
  python evaluate.py experiment="$data" stage=calibrate calibrate.shots="$CALIBRATE" seed=0 data_root="$DATA" \
    diffusion.model="$MODEL" diffusion.revision="${REVISION:-null}" $GENERATE
  relabel calibrated masks_from="outputs/$data/calibration_${folder}_train_${CALIBRATE}_seed0.yaml"
fi
for name in sam2_refine sam3; do
  variable=SAM2; if [ $name = sam3 ]; then variable=SAM3; fi
  revision=${variable}_REVISION
  if [ -n "${!variable:-}" ]; then
    relabel $name labeler=$name labeler.model="${!variable}" labeler.revision="${!revision:-null}"
  fi
done

for segmenter in ${SEGMENTERS//,/ }; do
  run="segmenter=$segmenter,seed=\${seed}"
  train synthetic "$segmenter" data="$data" name="${data}_synthetic/$run"
  for set in ${sets[@]+"${sets[@]}"}; do
    train synthetic "$segmenter" data="$data" name="${data}_$set/$run" synthetic_masks="masks/$set"
  done
  # Self-training: each run labels the synthetic images again, its own student learns from that.
  for seed in ${SEEDS//,/ }; do
    teacher="outputs/${data}_synthetic/segmenter=$segmenter,seed=$seed"
    python generate.py stage=label labeler.run="$teacher" data="$data" mask_set="self_${segmenter}_$seed" data_root="$DATA"
  done
  train synthetic "$segmenter" data="$data" name="${data}_self_training/$run" \
    synthetic_masks="masks/self_${segmenter}_\${seed}"
  # Real images: all of them, and mixed with synthetic ones.
  train real "$segmenter" data="$whole" name="${data}_real/$run"
  train mixed "$segmenter" data="$whole" name="${data}_mixed/$run"
  # A few real images after the synthetic ones, and the control: the same images alone, equal total steps.
  few="segmenter=$segmenter,shots=\${shots},seed=\${seed}"
  train finetune "$segmenter" data="$data" shots="$SHOTS" name="${data}_finetune/$few" init_from="outputs/${data}_synthetic/$run" \
    "${few_list[@]}"
  train real "$segmenter" shots="$SHOTS" name="${data}_few/$few" data="$data" trainer.max_steps="$TOTAL" \
    "${few_list[@]}"
done
for part in ${sets[@]+"${sets[@]}"} synthetic self_training real mixed finetune few; do score "${data}_$part"; done
python evaluate.py stage=report report.runs="outputs/${data}_*" data="$data" report.domains="[$data]" name="$data" data_root="$DATA"
