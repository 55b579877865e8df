#!/usr/bin/env bash
# Runs Python with the site hook and a real framework without a GPU: PyTorch of Debian 13, or
# TensorFlow from PyPI. The first call installs the framework in the cache (two minutes and 1 GiB
# each).
#
#   with-framework.sh torch|tensorflow PYTHON-ARGUMENT…
set -euo pipefail

framework=${1:?usage: with-framework.sh torch|tensorflow PYTHON-ARGUMENT…}
shift
site=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
. "$site/../images/versions"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent

fail() {
    echo "with-framework.sh: $*" >&2
    exit 1
}
# install_once NAME INPUT… sets `installed` to the cached directory for these inputs. If it is
# missing, calls install_NAME with the directory to fill.
install_once() {
    local name=$1 key part
    shift
    key=$(printf '%s\n' "$@" | cat "${BASH_SOURCE[0]}" - | sha256sum | cut -c1-16)
    installed=$cache/$name-$key
    [ ! -d "$installed" ] || return 0
    mkdir -p "$cache"
    part=$(mktemp -d "$installed.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf --one-file-system '$part'" EXIT
    chmod 755 "$part"
    "install_$name" "$part" >&2
    mv -T "$part" "$installed"
}
install_torch() {
    # The archive that this machine uses.
    local mirror
    mirror=$(awk '/^URIs:/ { print $2; exit } /^deb / { print $2; exit }' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true)
    mmdebstrap --quiet --mode=root --variant=minbase --include=python3-torch \
        --aptopt='Apt::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' trixie "$1" ${mirror:+"$mirror"}
    rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*
}
install_tensorflow() {
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check --compile \
        "tensorflow-cpu==$TENSORFLOW"
}

case $framework in
torch)
    [ "$(id -u)" = 0 ] || fail "PyTorch of Debian 13 requires root (chroot)"
    install_once torch
    export PYTHONPATH=/mnt
    # shellcheck disable=SC2016
    exec unshare --mount sh -ec '
        root=$1
        mount -t proc proc "$root/proc"
        mount --bind "$2" "$root/mnt"
        shift 2
        exec chroot "$root" python3 "$@"' sh "$installed" "$site" "$@"
    ;;
tensorflow)
    install_once tensorflow "$TENSORFLOW" "$(python3 --version)"
    export PYTHONPATH=$site
    exec "$installed/bin/python3" "$@"
    ;;
*) fail "unknown framework '$framework'; accepted: torch, tensorflow" ;;
esac
