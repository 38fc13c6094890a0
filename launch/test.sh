#!/usr/bin/env bash
# Runs every check: linters, types, scripts, and the unit, parallel and system tests. Installs on first use. All of them
# run whatever fails before; the status is that of all, and the last line is pytest's count.
#
#   launch/test.sh [arguments of pytest]        for example: launch/test.sh -k loader
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$launch")
# shellcheck source=launch/mpi.sh
source "$launch/mpi.sh"

started=$SECONDS
bash "$launch/install.sh" --test
cd "$root"
export PATH=$root/.venv/bin:$PATH
# Several ranks share these cores: threads of one would only take them from another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
leave_launch

failed=()
report=""

# check NAME COMMAND...: runs it, remembers its time and whether it failed.
check() {
    local name=$1 began=$SECONDS outcome=passed
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || {
        outcome=FAILED
        failed+=("$name")
    }
    report+=$(printf '%-10s %-7s %4d s' "$name" "$outcome" $((SECONDS - began)))$'\n'
}

# run_pytest LOG ARGUMENTS...: shows pytest's output and keeps it in LOG for its last line.
run_pytest() {
    local log=$1 color=no
    shift
    [[ -t 1 ]] && color=yes
    python -m pytest --color="$color" --durations=10 "$@" 2>&1 | tee "$log"
}

mapfile -t scripts < <(printf '%s\n' launch/*.sh launch/*/*.sh launch/*/*.sbatch .ci/run)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

check "ruff" ruff check .
check "format" ruff format --check .
check "mypy" mypy --strict hvdvae
check "shellcheck" shellcheck -x "${scripts[@]}"
check "pytest" run_pytest "$log" tests/unit tests/parallel tests/system "$@"

printf '\n%sall        %-7s %4d s with the installation\n' "$report" "${failed[0]:+FAILED}" $((SECONDS - started))
tail -n 1 "$log"
[[ ${#failed[@]} == 0 ]] || exit 1
