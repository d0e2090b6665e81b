#!/usr/bin/env bash
# One sitting at a CUDA machine, from clone to figures: `bash results/gpu.sh GAME [MINUTES]` (60 minutes).
#
#   tests    those that need a GPU: pytest -m gpu
#   profile  what an update costs and how long a whole run would take: results/profile.py
#   train    with `--preset paper --train_every 4`; when its minutes are over it is stopped, which saves it
#   score    16 episodes: evaluate.py; a training that came to its end has a score of its own
#   export   the agent without what only learning needs: results/export.py
#
# What is worth carrying home, some MB, goes to runs/gpu-GAME-home: log.txt, profile.json, metrics.jsonl,
# evaluation.json, agent/. The same command again trains the same run for MINUTES more. FLAGS replaces the
# settings: FLAGS="--preset debug --device cpu" tries the whole way without a GPU, with the tests skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
game=${1:?GAME is missing: bash results/gpu.sh GAME [MINUTES]}
minutes=${2:-60}
run=runs/gpu-${game//[^A-Za-z0-9_.-]/_}
home=$run-home
read -ra flags <<< "${FLAGS:---preset paper --train_every 4}"
mkdir -p "$home/agent"
failed=""

step() {  # a name, the exit code that is right beside 0, the command: one that fails does not cost the others
    echo "== $1: ${*:3}"
    "${@:3}"
    local code=$?
    [[ $code == 0 || $code == "$2" ]] || { echo "== $1 failed, exit code $code"; failed+=" $1"; }
} > >(tee -a "$home/log.txt")

step tests 0 python -m pytest test_hieros.py -m gpu -q -rs
step profile 0 python results/profile.py --game "$game" "${flags[@]}" --logdir "$home"
# --foreground: else timeout signals the group as well, and a second signal ends a run at once, unsaved.
step train 124 timeout --foreground -s TERM "${minutes}m" \
    python train.py --game "$game" "${flags[@]}" --logdir "$run" --resume
[[ -f $run/evaluation.json ]] || step score 0 python evaluate.py "$run" --episodes 16 --json "$run/evaluation.json"
step export 0 python results/export.py "$run" "$home/agent"
cp "$run/metrics.jsonl" "$run/evaluation.json" "$home" || failed+=" copy"
echo "${failed:+failed:$failed; }to carry home ($(du -sh "$home" | cut -f1)): $home"
[[ -z $failed ]]
