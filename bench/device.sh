#!/usr/bin/env bash
# Measure diffusion steps and the codec on a CUDA device, at the released sizes with random weights: ./bench/device.sh
# Ours and diffusers', each as it is and compiled, but diffusers' codec only as it is. Figures go to $OUT, or to ./out. It
# needs a Python that has torch for CUDA, diffusers and what the cli, dit and vae extras name; give it as PYTHON. It takes
# less than nine minutes; the rounds that are done by then stay. To rehearse it without a GPU, where nothing is compiled:
# SIZES=tiny DEVICE=cpu ./bench/device.sh
set -uo pipefail
cd "$(dirname "$0")/.."

out="${OUT:-out}"
device="${DEVICE:-cuda}"
read -ra sizes <<<"${SIZES:-2B XL}"
[[ "${sizes[0]}" == tiny ]] && codec=tiny || codec=real
export PYTHONPATH="protos/gen:services/runtime:services/dit:services/vae:cli${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
mkdir -p "$out"

failed=0
measure() { # seconds, name of the log, command and its flags
  timeout "$1" "${PYTHON:-python3}" -m soundstage_cli.bench.command "${@:3}" --device "$device" --output "$out" 2>&1 |
    tee "$out/$2.log" || failed=1
}
for size in "${sizes[@]}"; do
  measure $((370 / ${#sizes[@]})) "dit-$size" dit --size "$size"
done
for dtype in float32 bfloat16; do
  measure 75 "vae-$codec-$dtype" vae --size "$codec" --dtype "$dtype" --window 256 --window 1024
done
exit "$failed"
