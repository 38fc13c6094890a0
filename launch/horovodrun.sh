#!/usr/bin/env bash
# hvdvae on N ranks by horovodrun, over MPI where there is one it knows, else over Gloo:
#   launch/horovodrun.sh N train --data mnist ...
# HOSTS=host1:4,host2:4 spreads them; HVDVAE_HOROVODRUN_FLAGS has more flags for horovodrun.
set -euo pipefail
ranks=${1:?usage: launch/horovodrun.sh N COMMAND [--FLAG VALUE ...]}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || {
    echo "launch/horovodrun.sh: N is '$ranks', expected a number of ranks" >&2
    exit 2
}
shift
read -r -a more <<< "${HVDVAE_HOROVODRUN_FLAGS:-}"
flags=()
case " ${more[*]}" in
    # A controller of the user's choice: horovodrun takes one, and binding options only with MPI.
    *" --gloo"*|*" --jsrun"*) ;;
    # Elastic jobs are Gloo's.
    *" --min-n"*|*" --host-discovery-script"*) flags+=(--gloo) ;;
    *)
        case $(mpirun --version 2>&1 || true) in
            # Horovod's own binding options have been withdrawn in Open MPI 5.
            *"Open MPI"*) flags+=(--mpi "--binding-args=--bind-to none --map-by slot") ;;
            *)            flags+=(--gloo) ;;
        esac
        ;;
esac
[ -z "${HOSTS:-}" ] || flags+=(-H "$HOSTS")
launch=(horovodrun -np "$ranks" "${flags[@]}" "${more[@]}" hvdvae "$@")
# The mpirun below has been seen to end with 0, and not to end at all, where it had lost a host.
[ "${1:-}" != train ] || launch=(hvdvae supervise --restarts 0 -- "${launch[@]}")
exec "${launch[@]}"
