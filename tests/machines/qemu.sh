#!/usr/bin/env bash
# Boots a VM in QEMU with a kernel, udev, a disk, the context on a CD and a network, and waits until
# it powers off. Does not use KVM, so it works anywhere and takes one or two minutes.
#
#   qemu.sh LOWER MACHINE
#
# LOWER is overlayfs' list of read-only directories, MACHINE/upper the VM's own layer,
# MACHINE/upper/context the content of the CD. The harness's results are unpacked into
# MACHINE/upper/harness.
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
qemu-system-x86_64 -accel tcg,thread=multi -cpu max -machine q35 -smp 2 -m 2048 -nodefaults \
    -display none -no-reboot \
    -serial stdio -object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng \
    -drive file=root.ext4,format=raw,if=none,id=root,cache=unsafe \
    -device virtio-blk-pci,drive=root \
    -drive file=out.raw,format=raw,if=none,id=out,cache=unsafe \
    -device virtio-blk-pci,drive=out,serial=harness \
    -netdev user,id=net,restrict=on \
    -device virtio-net-pci,netdev=net,mac=02:00:0a:00:02:0f,romfile= \
    -drive file=context.iso,format=raw,if=none,id=context,media=cdrom,readonly=on \
    -device virtio-scsi-pci -device scsi-cd,drive=context \
    -kernel "$(echo "$root"/boot/vmlinuz-*)" -initrd "$(echo "$root"/boot/initrd.img-*)" \
    -append "root=/dev/vda rw console=ttyS0 net.ifnames=0 panic=-1 quiet \
systemd.wants=harness.service"
tar -xf out.raw -C upper/harness
