# shellcheck shell=bash
# A Slurm in which tests run batch jobs, on this machine and for their time only. To be sourced by install.sh.

# want_slurm: sees to it that its daemons are there; without, those tests say why they are skipped.
want_slurm() {
    local path=$PATH:/usr/sbin
    if PATH=$path type -P slurmctld slurmd munged sbatch >/dev/null; then return; fi
    # No daemon shall be started for good, neither now nor at the next boot.
    if debian_packages "Slurm" "slurmctld slurmd slurm-client munge libpmix-dev"; then
        if command -v systemctl >/dev/null; then
            systemctl disable --now slurmctld slurmd munge >/dev/null 2>&1 || true
        fi
        return
    fi
    echo "install: no Slurm on the path: the tests that run batch jobs will be skipped"
}
