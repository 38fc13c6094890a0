#!/usr/bin/env bash
# Trains a VAE on scikit-learn's handwritten digits with two workers on this machine, synchronously (allreduce) and
# asynchronously (a parameter server beside them), and prints both side by side. Installs on first use.
#
#   launch/demo.sh [flags of hvdvae train]      for example: launch/demo.sh --model conv --epochs 30
#
# Results land in runs/demo/sync and runs/demo/async. DEMO_OUT changes the folder, DEMO_RANKS the number of workers.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$launch")
# shellcheck source=launch/mpi.sh
source "$launch/mpi.sh"

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
esac

bash "$launch/install.sh"
started=$SECONDS

cd "$root"
export PATH=$root/.venv/bin:$PATH
leave_launch
ranks=${DEMO_RANKS:-2}
out=${DEMO_OUT:-runs/demo}
common=(--data digits --model mlp --batch-size 50 --epochs 60 --lr 1e-3 --overwrite)

train() {
    local name=$1 processes=$2
    shift 2
    mpirun_command "$processes"
    local command=("${MPIRUN_COMMAND[@]}" hvdvae train "${common[@]}" --out "$out/$name" "$@")
    echo
    echo "demo: ${command[*]}"
    "${command[@]}"
}

train sync "$ranks" --strategy allreduce "$@"
train async $((ranks + 1)) --strategy ps --consistency ssp --staleness 4 "$@"
echo
python launch/side_by_side.py "$out/sync" "$out/async"
echo "demo: done in $((SECONDS - started)) s"
