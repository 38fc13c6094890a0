# shellcheck shell=bash
# Which MPI, and how its mpirun wants to be called. To be sourced; sets no shell options and prints nothing by itself.

# find_mpi VENV: sets MPI_KIND (site or wheel), MPICC and MPIRUN. The site's MPI is the mpicc and the mpirun that come
# first on PATH, not counting VENV itself: an activated environment must not pass its own wheel for the site's.
# shellcheck disable=SC2034  # these are for the caller
find_mpi() {
    local directory outside="" directories
    IFS=: read -r -a directories <<<"$PATH"
    for directory in "${directories[@]}"; do
        [[ $directory -ef $1/bin ]] || outside+=${outside:+:}$directory
    done
    MPICC=$(PATH=$outside type -P mpicc) || MPICC=
    MPIRUN=$(PATH=$outside type -P mpirun) || MPIRUN=
    MPI_KIND=site
    if [[ ${HVDVAE_MPI:-} == wheel || -z $MPICC || -z $MPIRUN ]]; then
        MPI_KIND=wheel MPICC=$1/bin/mpicc MPIRUN=$1/bin/mpirun
    fi
}

# mpi_name MPIRUN: one line, as "Open MPI 5.0.11", "MPICH 5.0.2"; else what mpirun prints first, which no flag here fits.
mpi_name() {
    local said
    allow_root
    said=$("$1" --version 2>&1) || said="unknown MPI ($1 --version failed)"
    # Version 4 calls itself OpenRTE under any other name than mpirun, as Debian's mpirun.openmpi is.
    if [[ $said =~ \(Open\ ?[MR][PT][IE]\)\ +([0-9][^[:space:]]*) ]]; then
        echo "Open MPI ${BASH_REMATCH[1]}"
    elif [[ $said =~ HYDRA.*Version:\ +([0-9][^[:space:]]*) ]]; then
        echo "MPICH ${BASH_REMATCH[1]}"
    else
        head -n 1 <<<"$said"
    fi
}

# mpirun_command RANKS [MPIRUN]: sets the array MPIRUN_COMMAND to an mpirun of RANKS ranks on this machine, more than it
# has cores if need be and bound to none, since several launches may share it; exports what Open MPI asks of root.
mpirun_command() {
    local mpirun=${2:-mpirun}
    MPIRUN_COMMAND=("$mpirun" -np "$1")
    case $(mpi_name "$mpirun") in
        "Open MPI "[1-4].*) MPIRUN_COMMAND+=(--oversubscribe --bind-to none) ;;
        "Open MPI "*) MPIRUN_COMMAND+=(--map-by :OVERSUBSCRIBE --bind-to none) ;;
        MPICH*) MPIRUN_COMMAND+=(-bind-to none) ;;
        Intel*) export I_MPI_PIN=0 ;;
    esac
    allow_root
}

# allow_root: says to Open MPI that root means it.
allow_root() {
    if [[ $(id -u) == 0 ]]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
}

# leave_launch: forget an outer mpirun or srun, whose variables would make an inner mpirun believe to be one of its ranks
# or to own its allocation. What sites set for Open MPI itself (OMPI_MCA_*, OPAL_PREFIX) stays.
leave_launch() {
    local name
    while IFS= read -r name; do
        case $name in
            PMIX_MCA_* | PMIX_PREFIX) ;;
            OMPI_COMM_* | PMIX_* | PMI_* | SLURM_* | HOROVOD_RANK | HOROVOD_SIZE | HOROVOD_GLOO_*) unset "$name" ;;
        esac
    done < <(compgen -e)
}
