#!/usr/bin/env bash
# Builds the root file system of the image for ML_FRAMEWORK=base: Flower without a framework. For
# machines that reach the package archives of their distribution and of Python, but no image
# registry.
#
#   build-base.sh VERSION FILE.tar
#
# The release of Debian or Ubuntu is that of this machine (Python 3.11 or later: Debian 12, Ubuntu
# 24.04). Load the tar with `docker import` and the instructions that `build-base.sh --changes`
# prints.
set -euo pipefail

if [ "${1:-}" = --changes ]; then
    cat <<'CHANGES'
ENTRYPOINT ["flower-supernode"]
ENV PATH=/opt/flower/bin:/usr/local/bin:/usr/bin:/bin
WORKDIR /app
USER 49999:49999
CHANGES
    exit 0
fi

version=${1:?usage: build-base.sh VERSION FILE.tar}
output=${2:?usage: build-base.sh VERSION FILE.tar}
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || {
    echo "build-base.sh: VERSION is '$version', it must be X.Y.Z" >&2
    exit 2
}
[ "$(id -u)" = 0 ] || {
    echo "build-base.sh: must be run by root (chroot)" >&2
    exit 2
}

work=$(mktemp -d)
part=$output.$$.part
trap 'rm -rf --one-file-system "$work" "$part"' EXIT
root=$work/root

# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
mmdebstrap --quiet --mode=root --variant=minbase --include=python3,python3-venv,ca-certificates \
    --aptopt='Apt::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' "$release" "$root"

# During the build, pip in the root file system uses this machine's resolver, certificates and pip
# configuration: machine, user, environment, the last one wins.
mkdir -p "$root/build/machine/pip" "$root/build/user/pip"
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
ca=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
take_configuration() {
    [ -r "$1" ] || return 0
    cp "$1" "$2"
    local named
    named=$(sed -n 's/^[[:blank:]]*cert[[:blank:]]*=[[:blank:]]*//p' "$1" | tail -n 1)
    ca=${named:-$ca}
}
take_configuration /etc/pip.conf "$root/build/machine/pip/pip.conf"
take_configuration "${XDG_CONFIG_HOME:-${HOME:-/root}/.config}/pip/pip.conf" \
    "$root/build/user/pip/pip.conf"
take_configuration "${PIP_CONFIG_FILE:-}" "$root/build/pip.conf"
cp "${PIP_CERT:-$ca}" "$root/build/ca.crt"
pip_environment=(PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
    PIP_CERT=/build/ca.crt PIP_CONFIG_FILE=/build/pip.conf
    XDG_CONFIG_DIRS=/build/machine XDG_CONFIG_HOME=/build/user)
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST PIP_PROXY PIP_DEFAULT_TIMEOUT \
    PIP_RETRIES http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
    [ -z "${!name:-}" ] || pip_environment+=("$name=${!name}")
done
inside() { chroot "$root" env -i "${pip_environment[@]}" "$@"; }
inside python3 -m venv /opt/flower
# Compiled: without .pyc files Flower starts in 5 s instead of 2.
inside /opt/flower/bin/pip install --quiet --no-cache-dir --disable-pip-version-check --compile \
    "flwr==$version"
inside /opt/flower/bin/flower-supernode --help >/dev/null

printf 'app:x:49999:\n' >>"$root/etc/group"
printf 'app:x:49999:49999::/app:/usr/sbin/nologin\n' >>"$root/etc/passwd"
install -d -o 49999 -g 49999 "$root/app"
rm -rf "$root/build" "$root/etc/resolv.conf" "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* \
    "$root"/var/log/*

mkdir -p "$(dirname "$output")"
tar --numeric-owner --one-file-system --exclude=./dev/* -C "$root" -cf "$part" .
mv "$part" "$output"
