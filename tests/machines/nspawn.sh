#!/usr/bin/env bash
# Boots a machine with systemd as its first process, until it powers itself off. No kernel and no udev of its own.
#
#   nspawn.sh LOWER MACHINE
#
# LOWER is overlayfs' list of read-only folders; what the machine writes goes to MACHINE/upper, and stays for the next boot.
set -euo pipefail

export lower=${1:?} machine=${2:?}
mkdir -p "$machine"/{upper,work,merged,docker,containerd}
# A fresh cgroup file system, so that the machine's systemd has the root of one; and nothing stays mounted. The end of the first
# process here is the end of all, the machine's included: systemd-nspawn alone would leave them running.
exec unshare --mount --mount-proc --pid --fork --kill-child bash -euo pipefail <<'INSIDE'
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t overlay machine -o "lowerdir=$lower,upperdir=$machine/upper,workdir=$machine/work" "$machine/merged"
exec systemd-nspawn --quiet --directory="$machine/merged" --machine="$(basename "$machine")" --register=no --keep-unit \
    --private-network --capability=all --system-call-filter="add_key keyctl bpf" --console=pipe --resolv-conf=off \
    --link-journal=no --bind="$machine/docker:/var/lib/docker" --bind="$machine/containerd:/var/lib/containerd" \
    --boot -- systemd.wants=harness.service </dev/null
INSIDE
