# What runs/voc.sh and runs/coco.sh begin with: MODEL, DATA, GENERATE and TRAIN of the environment, in the checkout's folder;
# VOC, SBD and COCO name copies of the data that are there already, which are read in place and never written to.
set -euo pipefail
: "${MODEL:?give MODEL=<Stable Diffusion 2.1 base: a folder, or a hub id with REVISION=<commit>>}"
for name in MODEL SAM2 SAM3; do    # a path is meant from where you stand
  if [ -e "${!name:-}" ]; then printf -v "$name" %s "$(realpath "${!name}")"; fi
done
if [ -n "${DATA:-}" ]; then DATA=$(realpath -m "$DATA"); fi
for name in VOC SBD COCO LISTS; do
  if [ -n "${!name:-}" ]; then printf -v "$name" %s "$(realpath "${!name}")"; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DATA=${DATA:-$PWD/data}; GENERATE=${GENERATE:-}; TRAIN=${TRAIN:-}

# link <copy that is there, or nothing> <where the commands look for it>
link() {
  if [ -n "$1" ]; then mkdir -p "$(dirname "$2")"; ln -sfn "$1" "$2"; fi
}
