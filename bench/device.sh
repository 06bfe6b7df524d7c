#!/usr/bin/env bash
# Measure diffusion steps on a CUDA device, at the released sizes with random weights: ./bench/device.sh
# Ours and diffusers' transformer, each as it is and compiled. Figures go to $OUT, or to ./out. It needs a Python that has
# torch for CUDA, diffusers and what the cli and dit extras name; give it as PYTHON. It takes at most nine minutes; the
# rounds that are done by then stay. Flags go on to `soundstage bench dit`. To rehearse it without a GPU, where nothing is
# compiled unless --compiled asks for it: SIZES=tiny DEVICE=cpu ./bench/device.sh --rounds 1
set -uo pipefail
cd "$(dirname "$0")/.."

out="${OUT:-out}"
read -ra sizes <<<"${SIZES:-2B XL}"
export PYTHONPATH="protos/gen:services/runtime:services/dit:cli${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
mkdir -p "$out"

failed=0
for size in "${sizes[@]}"; do
  timeout $((520 / ${#sizes[@]})) "${PYTHON:-python3}" -m soundstage_cli.bench.command dit \
    --device "${DEVICE:-cuda}" --size "$size" --output "$out" "$@" 2>&1 | tee "$out/dit-$size.log" || failed=1
done
exit "$failed"
