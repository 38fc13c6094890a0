#!/usr/bin/env bash
# hvdvae on N ranks by mpirun, of Open MPI 4 or 5 or of MPICH:
#   launch/mpirun.sh N train --data mnist ...
# HOSTS=host1:4,host2:4 spreads them; HVDVAE_MPIRUN_FLAGS has more flags for mpirun.
set -euo pipefail
ranks=${1:?usage: launch/mpirun.sh N COMMAND [--FLAG VALUE ...]}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || {
    echo "launch/mpirun.sh: N is '$ranks', expected a number of ranks" >&2
    exit 2
}
shift
flags=()
case $(mpirun --version 2>&1) in
    *"Open MPI"*|*OpenRTE*|*PRRTE*)
        # Ranks set their own threads by the cores they have; a binding to one core each would leave them one.
        flags+=(--bind-to none)
        [ -z "${HOSTS:-}" ] || flags+=(--host "$HOSTS")
        # On this host alone, without a batch system, more ranks than cores take turns.
        if [ -z "${HOSTS:-}${SLURM_JOB_ID:-}${PBS_JOBID:-}" ] && [ "$ranks" -gt "$(nproc)" ]; then
            echo "launch/mpirun.sh: $ranks ranks take turns on $(nproc) cores" >&2
            export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1
        fi
        for name in OMP_NUM_THREADS HVDVAE_DATA; do
            [ -z "${!name:-}" ] || flags+=(-x "$name")
        done
        ;;
    *)  [ -z "${HOSTS:-}" ] || flags+=(-hosts "$HOSTS") ;;
esac
read -r -a more <<< "${HVDVAE_MPIRUN_FLAGS:-}"
launch=(mpirun -np "$ranks" "${flags[@]}" "${more[@]}" hvdvae "$@")
# Open MPI's mpirun has been seen to end with 0, and not to end at all, where it had lost a host.
[ "${1:-}" != train ] || launch=(hvdvae supervise --restarts 0 -- "${launch[@]}")
exec "${launch[@]}"
