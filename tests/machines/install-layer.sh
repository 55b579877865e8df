#!/usr/bin/env bash
# Makes the layer that the machines have above the root file system: the package, as dpkg installs it, the simulator for
# one-context, and the harness. Nothing is changed in ROOT.
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
# A mount namespace of its own: whatever happens, nothing stays mounted.
unshare --mount bash -euo pipefail <<'INSIDE'
mount --make-rprivate /
mount -t overlay machine -o "lowerdir=$root,upperdir=$part/upper,workdir=$part/work" "$part/merged"
cd "$part/merged"
mount --bind /proc proc
cp -R --preserve=mode "$guest/." .
cp "$package" harness/package.deb
# No service is started in a root file system that has not booted.
printf '#!/bin/sh\nexit 101\n' >usr/sbin/policy-rc.d
chmod 755 usr/sbin/policy-rc.d
chroot . env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 \
    dpkg --install /harness/package.deb >"$part/dpkg.log" 2>&1 || { cat "$part/dpkg.log"; exit 1; }
rm usr/sbin/policy-rc.d
chroot . systemctl --quiet enable one-context-local one-context-online one-context harness-image
umount proc
INSIDE
mv -T "$part/upper" "$layer"
