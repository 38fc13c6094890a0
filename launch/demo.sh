#!/usr/bin/env bash
# Trains a VAE on scikit-learn's handwritten digits with two ranks on this machine, after installing on first use.
#
#   launch/demo.sh [flags of hvdvae train]      for example: launch/demo.sh --model conv --epochs 30
#
# Results land in runs/demo, or where --out says. DEMO_RANKS changes the number of ranks.
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
mpirun_command "$ranks"
train=(hvdvae train --data digits --model mlp --strategy allreduce --batch-size 50 --epochs 60 --lr 1e-3
    --out runs/demo --overwrite)

echo
echo "demo: ${MPIRUN_COMMAND[*]} ${train[*]}${*:+ $*}"
"${MPIRUN_COMMAND[@]}" "${train[@]}" "$@"
echo "demo: done in $((SECONDS - started)) s"
