#!/usr/bin/env bash
# Trains until pgrpo exits with 0: after each failure it restarts from the newest checkpoint.
#   scripts/keep_running.sh RUN_DIR --config quickstart.yaml checkpoint.every=10 [KEY=VALUE ...]
# Gives up on wrong input (exit code 2), on Ctrl-C (130), and after $TRIES (5) failures in a row without a new checkpoint.
# Several GPUs: PGRPO="torchrun --nproc-per-node 8 -m pgrpo" scripts/keep_running.sh ...
# After a signal torchrun gives the ranks $TORCH_ELASTIC_SHUTDOWN_TIMEOUT (600) seconds to save, from PyTorch 2.12 on (2.11: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
interrupted=
trap 'interrupted=1' INT # needed because torchrun exits with 1 after Ctrl-C
run_dir=${1:?give the run folder, then the arguments of pgrpo train} failures=0 before=
shift
while true; do
    ${PGRPO:-pgrpo} train "$@" run_dir="$run_dir" --resume auto
    code=$?
    [ -z "$interrupted" ] || exit 130
    case $code in 0 | 2 | 130) exit $code ;; esac
    newest=$(ls "$run_dir/checkpoints" 2>/dev/null | grep '^step_' | sort -t_ -k2n | tail -n 1)
    failures=$((failures + 1))
    [ "$newest" = "$before" ] || failures=0 before=$newest
    echo "keep_running: exit code $code, newest checkpoint ${newest:-none}, failures without a new one: $failures of ${TRIES:-5}" >&2
    [ "$failures" -lt "${TRIES:-5}" ] || exit 1
done
