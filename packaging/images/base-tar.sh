#!/usr/bin/env bash
# Prints the path of the tar that build-base.sh builds for VERSION. Builds it (about two minutes)
# unless the cache has one for the same inputs.
#
#   base-tar.sh VERSION
set -euo pipefail

version=${1:?usage: base-tar.sh VERSION}
build=$(dirname "${BASH_SOURCE[0]}")/build-base.sh
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
key=$(cat "$build" <(echo "$version $release") | sha256sum | cut -c1-16)
tar=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent/image-base-$version-$key.tar
[ -e "$tar" ] || "$build" "$version" "$tar" >&2
echo "$tar"
