#!/usr/bin/env bash
# Several machines by hand: the same line on each, in any order.
#
#   NNODES=2 HEAD=host1:29500 launch/torchrun.sh CONFIG.yaml [section.key=value ...]
#
# HEAD is a machine of the job and a free port on it. NPROC: processes on each machine (default: its GPUs). RUN_ID: any word
# that no other job with this HEAD uses.
set -euo pipefail
: "${NNODES:?say how many machines: NNODES=2}" "${HEAD:?say where they meet, a machine of the job and a free port: HEAD=host1:29500}"
here=$(cd "$(dirname "$0")/.." && pwd)
python=${TITANS_PYTHON:-$here/.venv/bin/python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m torch.distributed.run --nnodes="$NNODES" --nproc-per-node="${NPROC:-$((gpus ? gpus : 1))}" \
  --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-titans}" -m titans_pretrain.train "$@"
