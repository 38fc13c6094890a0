# shellcheck shell=bash
# The compiler and the Python that a build needs: found, or installed where we may, or asked for. To be sourced.
: "${venv:?}" "${state:?}"

# debian_packages WHAT DEBIAN_PACKAGES: as root on Debian installs them; fails elsewhere.
debian_packages() {
    local what=$1 packages=$2
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 1
    echo "install: $what is missing: installing $packages with apt-get"
    mkdir -p "$state"
    # shellcheck disable=SC2086  # several package names
    if { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages; } \
        >"$state/apt.log" 2>&1; then
        return
    fi
    tail -n 5 "$state/apt.log" >&2
    return 1
}

# need_package WHAT DEBIAN_PACKAGES REMEDY...: as root on Debian installs them, else stops with the remedy.
need_package() {
    local what=$1 packages=$2
    shift 2
    if debian_packages "$what" "$packages"; then return; fi
    die "$what is missing. $*"
}

# find_python: sets PYTHON to $HVDVAE_PYTHON, or to what the environment was made with, or to the first python3 on PATH
# that is new enough.
find_python() {
    local candidate
    local candidates=("${HVDVAE_PYTHON:-}")
    if [[ -z ${HVDVAE_PYTHON:-} ]]; then
        candidates=("$("$venv/bin/python" -c 'import sys; print(sys._base_executable)' 2>/dev/null || true)"
            python3 python3.13 python3.12 python3.11)
    fi
    for candidate in "${candidates[@]}"; do
        PYTHON=$(type -P "$candidate") || continue
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    done
    candidate=${HVDVAE_PYTHON:-python3}
    die "Python 3.11 or newer is needed, found $({ "$candidate" --version || echo "no $candidate"; } 2>/dev/null | head -n 1)." \
        "Load a module that has it (module avail python), or set HVDVAE_PYTHON to the path of one."
}

# need_compiler STANDARD: a C++ compiler that knows C++STANDARD and the headers of PyTorch, make, and Python's headers.
need_compiler() {
    local cxx=${CXX:-c++} include
    if ! command -v "$cxx" >/dev/null || ! command -v make >/dev/null; then
        need_package "a C++ compiler or make" "g++ make" \
            "Install g++ and make, or load them (module load gcc), or ask your administrator for them; then run this again."
    fi
    if ! printf '%s\n' '#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 9' '#error old' '#endif' '#include <string>' |
        "$cxx" "-std=c++$1" -x c++ -fsyntax-only - 2>/dev/null; then
        die "$cxx ($("$cxx" --version 2>&1 | head -n 1)) is too old for C++$1 as the installed PyTorch needs it." \
            "Load a newer one (module load gcc) or set CC and CXX to one (GCC 9 or newer for C++17, 11 for C++20)."
    fi
    include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if [[ ! -e $include/Python.h ]]; then
        need_package "$include/Python.h" "$(basename "$include")-dev" \
            "Install Python's development package, or set HVDVAE_PYTHON to a Python that has its headers."
    fi
}
