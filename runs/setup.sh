# What runs/voc.sh and runs/coco.sh begin with: MODEL, DATA, GENERATE and TRAIN of the environment, in the checkout's folder.
set -euo pipefail
: "${MODEL:?give MODEL=<Stable Diffusion 2.1 base: a folder, or a hub id with REVISION=<commit>>}"
if [ -e "$MODEL" ]; then MODEL=$(realpath "$MODEL"); fi    # a path is meant from where you stand
if [ -n "${DATA:-}" ]; then DATA=$(realpath -m "$DATA"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DATA=${DATA:-$PWD/data}; GENERATE=${GENERATE:-}; TRAIN=${TRAIN:-}
