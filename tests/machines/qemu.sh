#!/usr/bin/env bash
# Boots a machine in QEMU until it powers itself off: a kernel, udev, a disk, the context on a CD, a network. No KVM is used,
# so it takes a minute or two anywhere.
#
#   qemu.sh LOWER MACHINE
#
# LOWER is overlayfs' list of read-only folders, MACHINE/upper what the machine has beside them, MACHINE/upper/context the CD.
# What the harness kept comes back in MACHINE/upper/harness.
set -euo pipefail

export lower=${1:?} machine=${2:?}
root=${lower##*:}
cd "$machine"
mkdir -p upper/context work merged
xorriso -as mkisofs -quiet -V CONTEXT -J -R -o context.iso upper/context
truncate -s 3G root.ext4
truncate -s 32M out.raw
unshare --mount bash -euo pipefail <<'INSIDE'
mount --make-rprivate /
mount -t overlay machine -o "lowerdir=$lower,upperdir=upper,workdir=work" merged
rm -rf merged/context
mke2fs -q -t ext4 -L root -d merged root.ext4
INSIDE
qemu-system-x86_64 -accel tcg,thread=multi -cpu max -machine q35 -smp 2 -m 2048 -nodefaults -display none -no-reboot \
    -serial stdio -object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng \
    -drive file=root.ext4,format=raw,if=none,id=root,cache=unsafe -device virtio-blk-pci,drive=root \
    -drive file=out.raw,format=raw,if=none,id=out,cache=unsafe -device virtio-blk-pci,drive=out,serial=harness \
    -netdev user,id=net,restrict=on -device virtio-net-pci,netdev=net,mac=02:00:0a:00:02:0f,romfile= \
    -drive file=context.iso,format=raw,if=none,id=context,media=cdrom,readonly=on \
    -device virtio-scsi-pci -device scsi-cd,drive=context \
    -kernel "$(echo "$root"/boot/vmlinuz-*)" -initrd "$(echo "$root"/boot/initrd.img-*)" \
    -append 'root=/dev/vda rw console=ttyS0 net.ifnames=0 panic=-1 quiet systemd.wants=harness.service'
tar -xf out.raw -C upper/harness
