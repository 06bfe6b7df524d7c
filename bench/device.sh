#!/usr/bin/env bash
# Measure on a CUDA device at the released sizes, with random weights: ./bench/device.sh
#
# Planning, decoding, diffusion steps and whole songs, each of ours against its peers, eager and compiled. Figures go to
# $OUT, or to ./out: a JSON file for each bench, history.jsonl, device.log. It takes less than nine minutes. Every bench
# has its share of the time that is left; one that is cut short leaves the rounds it finished; one that fails makes the
# exit status 1.
#
# It needs a Python with torch for CUDA, transformers, accelerate, safetensors, grpcio, matplotlib, rich and typer: name
# it as PYTHON. What else is imported is in bench/wheels.txt. A machine without a network has that as wheels in $WHEELS,
# or in ./.whl, which another machine fetches, here for Python 3.12:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux2014_x86_64 -d .whl -r bench/wheels.txt
#
# BENCHES names some of lm, vae, dit and song, TOTAL_S says how many seconds there are. To rehearse it on a CPU, where
# nothing is compiled: SIZES=tiny DEVICE=cpu ./bench/device.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit

out="${OUT:-out}" device="${DEVICE:-cuda}" python="${PYTHON:-python3}" wheels="${WHEELS:-.whl}"
benches=" ${BENCHES:-lm vae dit song} " sizes="${SIZES:-2B XL}" total_s="${TOTAL_S:-505}"
threads=$(($(nproc) < 4 ? $(nproc) : 4))
failed=0
shares=505 # of all benches below

measure() { # its share, the bench and its flags
  local limit_s=$(((total_s - SECONDS) * $1 / shares)) begun_s=$SECONDS status
  shares=$((shares - $1))
  [[ "$benches" == *" $2 "* ]] || return
  if ((limit_s < 1)); then
    echo "== ${*:2}: left out, no time"
    return
  fi
  echo "== ${*:2}: $limit_s s at most"
  timeout --signal INT --kill-after 15 "$limit_s" "$python" -m soundstage_cli.bench.command "${@:2}" \
    --device "$device" --threads "$threads" --output "$work"
  status=$?
  find "$work" -maxdepth 1 -name '*.json' -exec mv {} "$out" \;
  if ((status && SECONDS - begun_s >= limit_s)); then
    echo "== $2 was cut short after $limit_s s"
  elif ((status)); then
    echo "== $2 failed with status $status"
    failed=1
  fi
}

main() {
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  local site=
  if [[ -d "$wheels" ]]; then
    site="$work/site:"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 1
  fi
  export PYTHONPATH="${site}protos/gen:services/runtime:services/lm:services/dit:services/vae:gateway:cli:${PYTHONPATH:-}"
  export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::FutureWarning HF_HUB_OFFLINE=1 COLUMNS=140

  if [[ "$sizes" == tiny ]]; then
    measure 85 lm --size tiny --rounds 1 --codes 10 --songs 1 --cache "$work/cache"
    measure 45 vae --size tiny --rounds 1 --seconds 3 --dtype float32
    measure 40 vae --size tiny --rounds 1 --seconds 3 --dtype bfloat16
    measure 120 dit --size tiny --rounds 1 --max-seconds 30
    measure 215 song --size tiny --rounds 1 --seconds 2 --cache "$work/cache"
  else
    measure 85 lm --size 0.6B --cache "$work/cache" --rounds 3
    measure 45 vae --size real --dtype float32 --window 256 --window 1024
    measure 40 vae --size real --dtype bfloat16 --window 256 --window 1024
    measure 120 dit --size "${sizes%% *}"
    measure 150 song --size 2B --cache "$work/cache"
    [[ "$sizes" == *" "* ]] && measure 65 dit --size "${sizes##* }"
  fi
  if [[ -f "$work/history.jsonl" ]]; then
    cat "$work/history.jsonl" >>"$out/history.jsonl"
    "$python" -m soundstage_cli.bench.command history "$work"
  fi
  exit "$failed"
}

mkdir -p "$out"
main 2>&1 | tee "$out/device.log"
exit "${PIPESTATUS[0]}"
