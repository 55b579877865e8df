#!/usr/bin/env bash
# Builds the layer above the root file system of the VMs: the package as dpkg installs it, the
# one-context simulator and the harness. Does not change ROOT.
#
#   install-layer.sh ROOT PACKAGE.deb LAYER
set -euo pipefail

root=${1:?} package=${2:?} layer=${3:?}
guest=$(cd "$(dirname "${BASH_SOURCE[0]}")/guest" && pwd)
part=$(mktemp -d "$layer.XXXXXX")
trap 'rm -rf --one-file-system "$part"' EXIT
chmod 755 "$part"
mkdir "$part/work" "$part/merged" "$part/upper"
export part root guest package
# Use a separate mount namespace, so that no mount remains after a failure.
unshare --mount bash -euo pipefail <<'INSIDE'
mount --make-rprivate /
mount -t overlay machine -o "lowerdir=$root,upperdir=$part/upper,workdir=$part/work" "$part/merged"
cd "$part/merged"
mount --bind /proc proc
cp -R --preserve=mode "$guest/." .
cp "$package" harness/package.deb
# Prevent dpkg from starting services in a root file system that is not booted.
printf '#!/bin/sh\nexit 101\n' >usr/sbin/policy-rc.d
chmod 755 usr/sbin/policy-rc.d
chroot . env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 \
    dpkg --install /harness/package.deb >"$part/dpkg.log" 2>&1 || { cat "$part/dpkg.log"; exit 1; }
rm usr/sbin/policy-rc.d
chroot . systemctl --quiet enable one-context-local one-context-online one-context harness-image
umount proc
INSIDE
mv -T "$part/upper" "$layer"
