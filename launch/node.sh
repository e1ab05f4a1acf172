#!/usr/bin/env bash
# One per node, started by srun in slurm.sbatch: torchrun, and the signals that SLURM sends.
#
# Where SLURM tracks processes by cgroup, as real clusters do, only this process gets a signal; elsewhere the whole tree does.
# So SIGUSR2 is handed to the ranks from here, and torchrun, which would die of it, ignores it. Ranks take repeats for one.
#
#   node.sh PROGRAM ARGUMENTS...      what torchrun runs: a file, or -m MODULE
set -uo pipefail

(
  trap '' USR2 # inherited by the ranks until they listen
  exec "$TITANS_PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$TITANS_PROCESSES" \
    --max-restarts=0 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.$TITANS_LIFE.$TITANS_ATTEMPT" \
    --rdzv-endpoint="$TITANS_HEAD:$TITANS_PORT" --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
    --log-dir="$TITANS_RUN/log/torchrun/life_$TITANS_LIFE.$TITANS_ATTEMPT/${SLURMD_NODENAME:-$(hostname)}" -r 3 -t 0:3 \
    "$@"
) &
agent=$!
trap 'pkill -USR2 -P $agent' USR2
trap 'kill -TERM $agent' TERM
while :; do # a signal ends a wait
  wait $agent
  code=$?
  kill -0 $agent 2>/dev/null || break
done
exit $code
