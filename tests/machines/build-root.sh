#!/usr/bin/env bash
# Builds the root file system of the machines that tests boot: Debian 13, or the release of SUPERNODE_TESTS_RELEASE, with
# systemd, Docker, a kernel, and neither the package under test nor any file of it. Prints the folder. Done once: the folder's
# name has the hash of what went in.
#
#   build-root.sh
set -euo pipefail

release=${SUPERNODE_TESTS_RELEASE:-trixie}
packages=systemd-sysv,systemd,dbus,udev,iproute2,docker.io,containerd,runc,iptables,busybox-static,kmod,procps
packages+=,util-linux,curl,ca-certificates,python3-minimal,man-db,linux-image-cloud-amd64,initramfs-tools
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent
key=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-16)
root=$cache/root-$release-$key
if [ ! -d "$root" ]; then
    mkdir -p "$cache"
    part=$(mktemp -d "$root.XXXXXX")
    trap 'rm -rf --one-file-system "$part"' EXIT
    chmod 755 "$part"
    # The distribution's own archive, as this machine reaches it.
    mirror=$(awk '/^URIs:/ { print $2; exit } /^deb / { print $2; exit }' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)
    # The client is in docker.io before Debian 13.
    [ "$release" = bookworm ] || packages+=,docker-cli
    mmdebstrap --quiet --mode=root --variant=minbase --skip=check/qemu --include="$packages" \
        --aptopt='Apt::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/supernode-agent/*' \
        "$release" "$part" ${mirror:+"$mirror"} >&2
    rm -rf "$part"/var/lib/apt/lists/* "$part"/var/cache/apt/*.bin "$part/etc/resolv.conf"
    # Each machine gets its own at its first boot.
    : >"$part/etc/machine-id"
    mv -T "$part" "$root"
fi
echo "$root"
