#!/usr/bin/env bash
# Builds a bootable UEFI disk for OpenNebula (`make image`) with Docker, the package, one-context
# and a framework image. Needs neither a loop device nor a virtual machine: the file systems are
# created from directories.
#
#   build-image.sh PACKAGE.deb IMAGE.qcow2
#
# From the environment:
#   CONTEXT_PACKAGE    one-context package of OpenNebula/one-apps (a .deb). Required for production;
#                      without it the image gets the simulator that the tests use, and a notice.
#   FLOWER_VERSION     Flower release in the framework image (1.31.0)
#   NVIDIA=YES         also installs the driver and the NVIDIA Container Toolkit
#   NVIDIA_PACKAGES    their package names, separated by commas
#                      (nvidia-driver,nvidia-persistenced,nvidia-container-toolkit)
#   NVIDIA_SOURCES     file for /etc/apt/sources.list.d with NVIDIA's archive. Debian's archive has
#                      the driver (contrib, non-free, non-free-firmware), but not the toolkit.
#   ROOT_SIZE          size of the root file system (3G; 16G with NVIDIA=YES), which grows with the
#                      disk
set -euo pipefail

package=$(realpath "${1:?usage: build-image.sh PACKAGE.deb IMAGE.qcow2}")
output=$(realpath -m "${2:?usage: build-image.sh PACKAGE.deb IMAGE.qcow2}")
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
version=${FLOWER_VERSION:-1.31.0}
release=trixie
[ "$(id -u)" = 0 ] || {
    echo "build-image.sh: must be run by root (chroot)" >&2
    exit 2
}

work=$(mktemp -d)
dockerd_pid='' namespace=''
clean_up() {
    if [ -n "$dockerd_pid" ]; then
        kill "$dockerd_pid" 2>/dev/null || true
        wait "$dockerd_pid" 2>/dev/null || true
    fi
    [ -z "$namespace" ] || ip netns del "$namespace" || true
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
root=$work/root
report() { printf '%4d s  %s\n' $SECONDS "$*"; }

context=${CONTEXT_PACKAGE:-}
if [ -z "$context" ]; then
    report "CONTEXT_PACKAGE is not set: using the tests' one-context simulator. FOR TESTS ONLY"
    context=$work/one-context-simulator.deb
    "$top/tests/machines/build-one-context-simulator.sh" "$context"
fi

# linux-image-cloud is half the size. It has no graphics drivers.
kernel=linux-image-cloud-amd64 components=main size=${ROOT_SIZE:-3G} nvidia=''
if [ "${NVIDIA:-NO}" = YES ]; then
    kernel=linux-image-amd64,linux-headers-amd64 size=${ROOT_SIZE:-16G}
    components=main,contrib,non-free,non-free-firmware
    nvidia=${NVIDIA_PACKAGES:-nvidia-driver,nvidia-persistenced,nvidia-container-toolkit}
fi
report "root file system: $release, $kernel, Docker, ${nvidia:-no NVIDIA packages}"
packages=systemd-sysv,systemd,dbus,udev,kmod,iproute2,ifupdown,openssh-server,docker.io,docker-cli
packages+=,containerd,runc,iptables,ca-certificates,curl,cloud-guest-utils,parted,sudo,man-db
packages+=,bash-completion,apparmor,initramfs-tools,e2fsprogs
packages+=,grub-efi-amd64-signed,grub2-common,shim-signed,$kernel${nvidia:+,$nvidia}
mirror=$(awk '/^URIs:/ { print $2; exit } /^deb / { print $2; exit }' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)
install -d "$work/packages"
install -m 0644 "$package" "$context" "$work/packages"
# shellcheck disable=SC2016
mmdebstrap --quiet --mode=root --variant=minbase --skip=check/qemu \
    --components="$components" --include="$packages" \
    --aptopt='Apt::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook="sync-in '$work/packages' /tmp" \
    --customize-hook='chroot "$1" sh -c \
        "apt-get install --quiet --quiet --yes /tmp/*.deb >/dev/null; rm /tmp/*.deb"' \
    "$release" "$root" ${mirror:+"$mirror"} ${NVIDIA_SOURCES:+"$NVIDIA_SOURCES"} >&2
# Settings of the build.
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"

report "framework image: flwr/supernode:$version"
tar=$("$top/packaging/images/base-tar.sh" "$version")
mkdir -p "$root/opt/flower"
echo "$version" >"$root/opt/flower/PREBAKED_VERSION"
echo base >"$root/opt/flower/PREBAKED_FRAMEWORK"
# The image's own Docker imports it into the image's store, in a network namespace without
# interfaces.
namespace=supernode-image-$$
ip netns add "$namespace"
install -d "$root/build"
ln "$tar" "$root/build/image.tar" 2>/dev/null || cp "$tar" "$root/build/image.tar"
# shellcheck disable=SC2016
nsenter --net="/run/netns/$namespace" unshare --mount sh -ec '
    mount --make-rprivate /
    mount --bind "$0" "$0"
    mount --rbind /proc "$0/proc"; mount --rbind /sys "$0/sys"; mount --rbind /dev "$0/dev"
    mount -t tmpfs tmpfs "$0/run"
    # Not chroot: Docker can unpack images only if / is a mount point.
    cd "$0"
    mkdir build/outside
    pivot_root . build/outside
    umount -l build/outside
    exec dockerd --host unix:///build/docker.sock \
        --pidfile /run/docker.pid --exec-root /run/docker-exec \
        --bridge none --iptables=false --ip6tables=false --config-file /build/none.json
' "$root" >"$work/dockerd.log" 2>&1 &
dockerd_pid=$!
in_image() { chroot "$root" docker --host unix:///build/docker.sock "$@"; }
echo '{}' >"$root/build/none.json"
for _ in $(seq 300); do
    in_image version >/dev/null 2>&1 && break
    kill -0 "$dockerd_pid" 2>/dev/null || {
        tail -n 20 "$work/dockerd.log" >&2
        exit 1
    }
    sleep 0.1
done
changes=()
while IFS= read -r change; do
    changes+=(--change "$change")
done < <("$top/packaging/images/build-base.sh" --changes)
in_image import "${changes[@]}" /build/image.tar "flwr/supernode:$version" >/dev/null
kill "$dockerd_pid"
wait "$dockerd_pid" || true
dockerd_pid=''
rm -rf "$root/build" "$root"/var/lib/docker/{tmp,runtimes,network}

report "disk"
root_uuid=$(cat /proc/sys/kernel/random/uuid)
esp_id=$(od -An -N4 -tx4 /dev/urandom | tr -d ' ' | tr a-f A-F)
cat >"$root/etc/fstab" <<FSTAB
UUID=$root_uuid / ext4 errors=remount-ro 0 1
UUID=${esp_id:0:4}-${esp_id:4} /boot/efi vfat umask=0077,nofail 0 2
FSTAB
mkdir -p "$root/boot/efi" "$root/boot/grub"
# For update-grub, which rewrites grub.cfg at the first kernel upgrade.
echo 'GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0"' >>"$root/etc/default/grub"
cat >"$root/boot/grub/grub.cfg" <<GRUB
set timeout=0
menuentry 'Debian' {
    search --no-floppy --fs-uuid --set=root $root_uuid
    linux /vmlinuz root=UUID=$root_uuid ro console=tty0 console=ttyS0
    initrd /initrd.img
}
GRUB
# Each VM generates its own host keys at its first boot.
install -d "$root/etc/systemd/system/ssh.service.d"
cat >"$root/etc/systemd/system/ssh.service.d/host-keys.conf" <<'DROPIN'
[Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
DROPIN
echo supernode >"$root/etc/hostname"
: >"$root/etc/machine-id"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/etc/ssh/ssh_host_* \
    "$root"/var/log/*.log "$root/etc/resolv.conf"
truncate -s "$size" "$work/root.ext4"
mke2fs -q -t ext4 -L root -U "$root_uuid" -d "$root" "$work/root.ext4"

truncate -s 64M "$work/esp"
mkfs.vfat -i "$esp_id" -n ESP "$work/esp" >/dev/null
cat >"$work/grub.cfg" <<GRUB
search.fs_uuid $root_uuid root
set prefix=(\$root)'/boot/grub'
configfile \$prefix/grub.cfg
GRUB
mmd -i "$work/esp" ::/EFI ::/EFI/BOOT ::/EFI/debian
mcopy -i "$work/esp" "$root/usr/lib/shim/shimx64.efi.signed" ::/EFI/BOOT/BOOTX64.EFI
mcopy -i "$work/esp" "$root/usr/lib/shim/mmx64.efi.signed" ::/EFI/BOOT/mmx64.efi
mcopy -i "$work/esp" "$root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" \
    ::/EFI/BOOT/grubx64.efi
mcopy -i "$work/esp" "$work/grub.cfg" ::/EFI/debian/grub.cfg

mib=$((1024 * 1024))
esp_mib=$(($(stat -c %s "$work/esp") / mib))
root_mib=$(($(stat -c %s "$work/root.ext4") / mib))
truncate -s $(((esp_mib + root_mib + 2) * mib)) "$work/disk"
sfdisk --quiet --no-tell-kernel "$work/disk" <<TABLE
label: gpt
start=1MiB, size=${esp_mib}MiB, type=uefi
start=$((1 + esp_mib))MiB, size=${root_mib}MiB, type=linux
TABLE
dd if="$work/esp" of="$work/disk" bs=1M seek=1 conv=notrunc,sparse status=none
dd if="$work/root.ext4" of="$work/disk" bs=1M seek=$((1 + esp_mib)) conv=notrunc,sparse \
    status=none
[ "$(sfdisk --dump "$work/disk" | grep -c 'type=')" = 2 ]
mkdir -p "$(dirname "$output")"
qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd "$work/disk" "$output.part"
mv "$output.part" "$output"
report "$output, $(($(stat -c %s "$output") / mib)) MiB"
