# shellcheck shell=bash
# Horovod for exactly this MPI, torch, Python and environment: from the cache, or built and put there. To be sourced.
: "${venv:?}" "${state:?}" "${requirements:?}" "${launch:?}" "${cache:?}"

# cxx_standard: the C++ standard that the headers of the installed torch ask for; by its version where they do not say.
cxx_standard() {
    local include said
    include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch/include
    said=$(sed -n 's/^#error C++\([0-9][0-9]\) or later.*/\1/p' \
        "$include/ATen/ATen.h" "$include/torch/csrc/api/include/torch/all.h" 2>/dev/null | sort -n | tail -n 1) || true
    if [[ -z $said ]]; then
        said=17
        if [[ $(printf '%s\n' "$1" 2.14 | sort -V | head -n 1) == 2.14 ]]; then said=20; fi
    fi
    echo "$said"
}

# shellcheck disable=SC2034  # WHY_NO_NCCL is for the caller
# find_nccl: where torch is a CUDA build and nvcc of the same CUDA is here, sets CUDA_HOME and NCCL_LINKS; else WHY_NO_NCCL.
find_nccl() {
    local cuda=$1 candidate nccl release
    NCCL_LINKS="" WHY_NO_NCCL=""
    if [[ $cuda == none ]]; then
        WHY_NO_NCCL="CPU build of torch"
        return
    fi
    for candidate in "${CUDA_HOME:-}" "${HOROVOD_CUDA_HOME:-}" "$(dirname "$(dirname "$(realpath "$(type -P nvcc || echo /)")")")" \
        "/usr/local/cuda-$cuda" /usr/local/cuda; do
        # nvcc on PATH may be a wrapper script: only a root that has the headers counts.
        [[ -n $candidate && -x $candidate/bin/nvcc && -e $candidate/include/cuda_runtime.h ]] && break
        candidate=""
    done
    if [[ -z $candidate ]]; then
        WHY_NO_NCCL="no nvcc with CUDA's headers: load CUDA $cuda (module load cuda) or set CUDA_HOME, then run this again"
        return
    fi
    release=$("$candidate/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
    if [[ ${release%%.*} != "${cuda%%.*}" ]]; then
        WHY_NO_NCCL="nvcc in $candidate is CUDA $release, torch is built for $cuda: load CUDA ${cuda%%.*}, then run this again"
        return
    fi
    nccl=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/nvidia/nccl
    if [[ ! -e $nccl/lib/libnccl.so.2 ]]; then
        WHY_NO_NCCL="this torch brings no NCCL wheel ($nccl/lib/libnccl.so.2 is absent)"
        return
    fi
    export CUDA_HOME=$candidate
    # The wheel has no libnccl.so, which the linker asks for. These links land in the RUNPATH, so they must stay.
    NCCL_LINKS=$venv/nccl
    mkdir -p "$NCCL_LINKS/lib"
    ln -sfn "$nccl/include" "$NCCL_LINKS/include"
    ln -sf "$nccl/lib/libnccl.so.2" "$NCCL_LINKS/lib/libnccl.so"
    ln -sf "$nccl/lib/libnccl.so.2" "$NCCL_LINKS/lib/libnccl.so.2"
}

# native_key: what a wheel of Horovod (and of mpi4py from source) is good for, one thing a line.
native_key() {
    echo "recipe 1"
    grep -h . "$launch/horovod/requirement.txt"
    echo "mpi $MPI_KIND $MPI_NAME $(realpath "$MPICC")"
    echo "torch $TORCH_VERSION cuda $TORCH_CUDA c++$CXX_STANDARD"
    "$venv/bin/python" -c 'import platform, sys; print("python", sys.version.split()[0], platform.machine())'
    echo "environment $venv"
    echo "nccl ${NCCL_LINKS:+$CUDA_HOME $("$CUDA_HOME/bin/nvcc" --version | tail -n 1) $(realpath "$NCCL_LINKS/lib/libnccl.so")}"
}

# build_native DIRECTORY: builds the wheels of Horovod and, for a site's MPI, mpi4py into DIRECTORY. Two to three minutes.
build_native() {
    local log=$state/build.log
    need_compiler "$CXX_STANDARD"
    echo "install: building Horovod (about 3 minutes on 2 cores); log: $log"
    (
        PATH=$venv/bin:$(dirname "$MPICC"):$PATH
        export PATH MAKEFLAGS="${MAKEFLAGS:--j$(($(nproc) < 16 ? $(nproc) : 16))}" # up to 2 GB a job
        export HVDVAE_CXX_STANDARD=$CXX_STANDARD CMAKE_TOOLCHAIN_FILE=$launch/horovod/toolchain.cmake
        export CMAKE_POLICY_VERSION_MINIMUM=3.5
        export HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITH_PYTORCH=1
        export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
        if [[ -n $NCCL_LINKS ]]; then
            export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_CUDA_HOME=$CUDA_HOME HOROVOD_NCCL_HOME=$NCCL_LINKS
            export LIBRARY_PATH=$CUDA_HOME/lib64:$CUDA_HOME/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
            export HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-$(gpu_capabilities)}
        else
            unset HOROVOD_GPU_OPERATIONS HOROVOD_GPU
        fi
        # pip's own cache would hand out a wheel that was built for another MPI.
        "$venv/bin/pip" wheel --no-cache-dir --no-build-isolation --no-deps --no-binary horovod --require-hashes \
            -w "$1" -r "$launch/horovod/requirement.txt" || exit
        if [[ $MPI_KIND == site ]]; then
            # Its wheel finds libmpi at run time, which need not be the one of this mpicc.
            export MPICC PIP_CONSTRAINT=$requirements/optional.txt
            "$venv/bin/pip" wheel --no-cache-dir --no-deps --no-binary mpi4py -w "$1" "$(pin_of mpi4py)" || exit
        fi
    ) >"$log" 2>&1 || {
        grep -E 'error|Error' "$log" | tail -n 15 >&2
        die "the build of Horovod failed; everything it said is in $log. It used $MPI_NAME ($MPICC), torch $TORCH_VERSION," \
            "C++$CXX_STANDARD and ${CXX:-c++}; load another MPI or compiler and run this again."
    }
}

# gpu_capabilities: compute capabilities of the GPUs here, as 80,90; those two where none answers.
gpu_capabilities() {
    local found
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | sort -u | paste -sd, -) || found=""
    echo "${found:-80,90}"
}

# shellcheck disable=SC2034  # HOROVOD_FROM is for the caller
# install_native: sets HOROVOD_FROM; installs mpi4py and Horovod for the key, unless the environment already holds them.
install_native() {
    local key entry
    key=$(native_key)
    if [[ $(cat "$state/native.key" 2>/dev/null) == "$key" ]] &&
        "$venv/bin/python" "$launch/installed.py" "$launch/horovod/requirement.txt" >/dev/null &&
        "$venv/bin/python" -c 'import mpi4py' 2>/dev/null; then
        HOROVOD_FROM="installed already"
        return
    fi
    rm -f "$state/native.key"
    entry=$cache/$(sha256sum <<<"$key" | cut -c 1-16)
    HOROVOD_FROM="cached in $entry"
    if ! install_wheels "$entry"; then
        rm -rf "$entry"
        built=$(mktemp -d "$cache/building.XXXXXX")
        trap 'rm -rf "${built:?}"' EXIT
        build_native "$built"
        echo "$key" >"$built/key"
        mv -T "$built" "$entry" 2>/dev/null || rm -rf "$built" # another environment of the same key was faster
        trap - EXIT
        HOROVOD_FROM="built now, cached in $entry"
        install_wheels "$entry" || die "Horovod was built but does not import. Load the same modules as for the build" \
            "(its MPI's libraries must be found), then run: $venv/bin/python -c 'import horovod.torch'"
    fi
    echo "$key" >"$state/native.key"
}

# install_wheels ENTRY: installs an entry of the cache; fails if it is not there or does not import.
install_wheels() {
    [[ -e $1/key ]] || return 1
    if [[ $MPI_KIND == wheel ]]; then
        pip_install --only-binary mpi4py --no-deps --force-reinstall "$(pin_of mpi4py)" || return 1
    fi
    pip_install --no-deps --force-reinstall "$1"/*.whl || return 1
    (cd / && "$venv/bin/python" -c 'import mpi4py.MPI, horovod.torch') >"$state/import.log" 2>&1
}
