#!/usr/bin/env bash
# The proof on one GPU: the exact commands, in order of worth, with the minutes each may take (estimates until they have run).
#
#   bash bench/gpu_all.sh                          # everything into bench/results, half an hour
#   bash bench/gpu_all.sh FOLDER                   # into FOLDER
#   bash bench/gpu_all.sh FOLDER correctness generate      # only these items
#
# Variables: PYTHON (interpreter), SMOLLM2 (model folder for `learn`, else the toy), LEARN_MINUTES (9), COMMIT (where git is
# absent, for the tables). Needs torch and transformers; `generate` needs vLLM, the TRL rows of `update` need trl and datasets.
# A script that fails leaves its table so far and does not stop the others; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
shift || true
items=${*:-correctness update generate profile compile tiles learn projection}
python=${PYTHON:-python}
worst=0
mkdir -p "$out"

run() {
    echo; echo "=== $*"
    PYTHONUNBUFFERED=1 "$python" "$@" || worst=1
}

for item in $items; do
    case $item in
        correctness) run bench/gpu_correctness.py --minutes 3 --out "$out/gpu_correctness.json" ;;                       # 2 min
        update)      run bench/gpu_update.py --minutes 8 --out "$out/gpu_update.json" ;;                                 # 7 min
        generate)    run bench/gpu_generate.py --minutes 7 --out "$out/gpu_generate.json" ;;                             # 5 min
        profile)     run bench/gpu_update.py --minutes 2 --budgets 16384 --recompute 1 --trl_micro --profile \
                         --out "$out/gpu_profile.json" ;;                                                                # 1 min
        compile)     run bench/gpu_update.py --minutes 4 --budgets 16384 --recompute 1 --trl_micro --compile parts layers \
                         --out "$out/gpu_compile.json" ;;                                                                # 3 min
        tiles)       run bench/gpu_update.py --minutes 3 --budgets 16384 --recompute 1 --trl_micro --chunk 512 2048 4096 8192 \
                         --out "$out/gpu_tiles.json" ;;                                                                  # 2 min
        learn)       run bench/gpu_learn.py --minutes "${LEARN_MINUTES:-9}" ${SMOLLM2:+--model "$SMOLLM2"} \
                         --out "$out/gpu_learn.json" ;;                                                                  # 9 min
        projection)  run bench/gpu_projection.py --update "$out/gpu_update.json" --generate "$out/gpu_generate.json" \
                         --out "$out/gpu_projection.json" ;;                                                             # seconds
        *)           echo "unknown item: $item" >&2; exit 2 ;;
    esac
done
exit $worst
