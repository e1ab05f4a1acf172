# What one node must have before Python can say anything: run by slurm.sbatch on every node, from its text, since the run
# folder itself may be what is missing. Prints "OK HOST" or "BAD HOST reason; reason". Reads RUN_DIR, T0, GPUS.
host=$(hostname -s)
bad=()
if [ -r "$RUN_DIR/launch/env.sh" ]; then
  probe=$RUN_DIR/.probe_$host
  { : >"$probe" && rm -f "$probe"; } 2>/dev/null || bad+=("run folder $RUN_DIR cannot be written")
  free=$(df -Pk "$RUN_DIR" | awk 'NR == 2 { print int($4 / 1024) }')
  [ "${free:-0}" -ge "${FREE_MB:-1}" ] || bad+=("$free MB free in $RUN_DIR, a checkpoint needs ${FREE_MB:-1}")
else
  bad+=("run folder $RUN_DIR is not there: is its file system mounted?")
fi
off=$(($(date +%s) - T0))
[ "${off#-}" -lt 60 ] || bad+=("clock is off by $off s from the first node's: is NTP running?")
if [ "${GPUS:-0}" -gt 0 ] && command -v nvidia-smi >/dev/null; then
  count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
  [ "$count" -ge "$GPUS" ] || bad+=("$count GPUs answer, $GPUS are asked for")
fi
if [ ${#bad[@]} = 0 ]; then
  echo "OK $host"
else
  printf -v text '%s; ' "${bad[@]}"
  echo "BAD $host ${text%; }"
fi
