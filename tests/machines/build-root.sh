#!/usr/bin/env bash
# Builds the root file system of the VMs that tests boot: Debian 13, or the release
# SUPERNODE_TESTS_RELEASE, with systemd, Docker and a kernel, but without the package under test.
# Prints the directory. The result is cached under a name with the hash of this script.
#
#   build-root.sh
set -euo pipefail

release=${SUPERNODE_TESTS_RELEASE:-trixie}
packages=systemd-sysv,systemd,dbus,udev,iproute2,docker.io,containerd,runc,iptables,busybox-static
packages+=,kmod,procps,util-linux,curl,ca-certificates,python3-minimal,man-db
packages+=,linux-image-cloud-amd64,initramfs-tools
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent
key=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-16)
root=$cache/root-$release-$key
if [ ! -d "$root" ]; then
    mkdir -p "$cache"
    part=$(mktemp -d "$root.XXXXXX")
    trap 'rm -rf --one-file-system "$part"' EXIT
    chmod 755 "$part"
    # This machine's own Debian mirror.
    mirror=$(awk '/^URIs:/ { print $2; exit } /^deb / { print $2; exit }' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)
    # Before Debian 13 the client is in docker.io.
    [ "$release" = bookworm ] || packages+=,docker-cli
    mmdebstrap --quiet --mode=root --variant=minbase --skip=check/qemu --include="$packages" \
        --aptopt='Apt::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/supernode-agent/*' \
        "$release" "$part" ${mirror:+"$mirror"} >&2
    rm -rf "$part"/var/lib/apt/lists/* "$part"/var/cache/apt/*.bin "$part/etc/resolv.conf"
    # Created at the first boot of each VM.
    : >"$part/etc/machine-id"
    mv -T "$part" "$root"
fi
echo "$root"
