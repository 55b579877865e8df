#!/usr/bin/env bash
# Boots a VM under systemd-nspawn, with systemd as PID 1 but without its own kernel and udev, and
# waits until it powers off.
#
#   nspawn.sh LOWER MACHINE
#
# LOWER is overlayfs' list of read-only directories. Writes go to MACHINE/upper and persist to the
# next boot.
set -euo pipefail

export lower=${1:?} machine=${2:?}
mkdir -p "$machine"/{upper,work,merged,docker,containerd}
# Mounts a new cgroup file system, so that the VM's systemd has the root of a hierarchy, and leaves
# no mounts. The PID namespace ensures that killing its first process kills the VM too;
# systemd-nspawn alone would leave it running.
exec unshare --mount --mount-proc --pid --fork --kill-child bash -euo pipefail <<'INSIDE'
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t overlay machine -o "lowerdir=$lower,upperdir=$machine/upper,workdir=$machine/work" \
    "$machine/merged"
exec systemd-nspawn --quiet --directory="$machine/merged" --machine="$(basename "$machine")" \
    --register=no --keep-unit \
    --private-network --capability=all --system-call-filter="add_key keyctl bpf" --console=pipe \
    --resolv-conf=off \
    --link-journal=no --bind="$machine/docker:/var/lib/docker" \
    --bind="$machine/containerd:/var/lib/containerd" \
    --boot -- systemd.wants=harness.service </dev/null
INSIDE
