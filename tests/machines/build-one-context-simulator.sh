#!/usr/bin/env bash
# Builds a package of the one-context simulator, for VM images that are built from packages.
#
#   build-one-context-simulator.sh PACKAGE.deb
set -euo pipefail

output=${1:?usage: build-one-context-simulator.sh PACKAGE.deb}
guest=$(cd "$(dirname "${BASH_SOURCE[0]}")/guest" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
install -D -m 0755 -t "$work/usr/sbin" "$guest/usr/sbin/one-contextd"
install -D -m 0644 -t "$work/usr/lib/systemd/system" \
    "$guest"/etc/systemd/system/one-context*.service
mkdir "$work/DEBIAN"
cat >"$work/DEBIAN/control" <<'CONTROL'
Package: one-context-simulator
Version: 1
Architecture: all
Maintainer: supernode-agent developers <supernode-agent@localhost>
Description: simulator of one-context, for tests
CONTROL
printf '#!/bin/sh\nsystemctl --quiet enable one-context-local one-context-online one-context\n' \
    >"$work/DEBIAN/postinst"
chmod 755 "$work/DEBIAN/postinst"
dpkg-deb --build --root-owner-group "$work" "$output" >/dev/null
