#!/usr/bin/env bash
# All GPUs of this machine, or NPROC processes where there are none.
#
#   launch/local.sh CONFIG.yaml [section.key=value ...]
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${TITANS_PYTHON:-$here/.venv/bin/python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="${NPROC:-$((gpus ? gpus : 1))}" \
  -m titans_pretrain.train "$@"
