#!/usr/bin/env bash
# The embedded example site: shapes_shift, of which 768 photographs are at hand and no label. What each step without labels
# gains, what 16 and 64 labels add, and whether a review queue chooses better ones than chance; three seeds. Writes
# benchmarks/results/site.json; results of the first world: docs/first-world.md. Finished parts (those of demo and study too)
# are skipped. Cost: about 3 hours of 2 CPU cores with the first world's images of 64 px; not measured with those of 128 px.
# JOBS trainings run side by side, as in shapes.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2}
CORES=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
JOBS=${JOBS:-$(if command -v nvidia-smi >/dev/null; then echo 1; else echo $((CORES < 4 ? CORES : 4)); fi)}
each() { OMP_NUM_THREADS=$((CORES / JOBS > 0 ? CORES / JOBS : 1)) xargs -P "$JOBS" -L 1 python "$@"; }
trainings() { each train.py trainer.enable_progress_bar=$([ "$JOBS" = 1 ] && echo true || echo false); }
seeds() { for seed in $SEEDS; do echo "${1//SEED/$seed}"; done; }

python -m dd prepare shapes
python generate.py experiment=shapes
SITE=outputs/site PHOTOS=outputs/site/photos
mkdir -p $PHOTOS
while read -r name; do cp -n "data/shapes_shift/JPEGImages/$name.png" $PHOTOS/; done <data/shapes_shift/ImageSets/Segmentation/train.txt

seeds "experiment=shapes_synthetic seed=SEED" | trainings
# The generator, adapted with captions of what the first synthetic-only segmenter sees: no label, no captioner.
python evaluate.py stage=predict run="outputs/shapes/synthetic/seed=${SEEDS%% *}" images=$PHOTOS output=$SITE/seen
python train.py experiment=shapes_adapt_generator name=site/adapter adapter.images=$PHOTOS adapter.list=null \
  adapter.captions=$SITE/seen/captions.jsonl
python generate.py experiment=shapes name=shapes_adapted diffusion.adapter=$SITE/adapter
THIRD="trainer.max_steps=300 optimizer.learning_rate=1.0e-3"
ADAPTED="synthetic=data/synthetic/shapes_adapted"
{
  seeds "experiment=shapes_synthetic name=site/generator/seed=SEED seed=SEED $ADAPTED"
  seeds "experiment=shapes_adapt_segmenter name=site/segmenter/seed=SEED seed=SEED unlabelled.images=$PHOTOS"
  seeds "experiment=shapes_adapt_segmenter name=site/segmenter_300/seed=SEED seed=SEED unlabelled.images=$PHOTOS $THIRD"
  seeds "experiment=shapes_adapt_segmenter name=site/synthetic_longer/seed=SEED seed=SEED self_training=off"
} | trainings
seeds "experiment=shapes_adapt_segmenter name=site/generator_segmenter/seed=SEED seed=SEED $ADAPTED init_from=$SITE/generator/seed=SEED unlabelled.images=$PHOTOS $THIRD" | trainings
# Labels: 16 and 64 at random (nested, by seed), and the 16 that the adapted segmenter is least sure of; the control: as many
# steps more without a label.
for seed in $SEEDS; do
  python evaluate.py stage=review run=$SITE/segmenter/seed=$seed images=$PHOTOS review.number=16 output="$SITE/queue/seed=$seed"
  python -m dd prepare own --taxonomy shapes --name "site_queue_$seed" --images "$SITE/queue/seed=$seed/images" \
    --masks data/shapes_shift/SegmentationClass --split train="$SITE/queue/seed=$seed/train.txt"
done
MORE="seed=SEED init_from=$SITE/segmenter/seed=SEED unlabelled.images=$PHOTOS"
{
  seeds "experiment=shapes_adapt_segmenter name=site/segmenter_longer/seed=SEED trainer.max_steps=150 optimizer.learning_rate=1.0e-3 $MORE"
  for shots in 16 64; do
    seeds "experiment=shapes_adapt_labels name=site/labels_$shots/seed=SEED data=shapes_shift shots=$shots $MORE"
  done
  seeds "experiment=shapes_adapt_labels name=site/labels_queue/seed=SEED data=own data.name=site_queue_SEED shots=all $MORE"
  for shots in 16 64 all; do
    seeds "experiment=shapes_real data=shapes_shift shots=$shots seed=SEED"
  done
  seeds "experiment=shapes_real name=site/real_longer/seed=SEED data=shapes_shift shots=all seed=SEED trainer.max_steps=1440"
} | trainings
for runs in "shapes/synthetic/seed=*" "shapes/real_shapes_shift/*" "site/*/seed=*"; do
  echo "run=outputs/$runs data=shapes_shift"
done | each evaluate.py
python -m benchmarks.site --figure docs/site.png
