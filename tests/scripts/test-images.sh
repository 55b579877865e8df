#!/usr/bin/env bash
# `make test-images`: builds the framework images that fit on a small machine, on a private engine,
# and runs them as the agent does. Needs no registry: the base image is made of Debian packages.
#
#   test-images.sh [FRAMEWORK…]   (base sklearn)
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
frameworks=("$@")
[ $# -gt 0 ] || frameworks=(base sklearn)
[ "$(id -u)" = 0 ] || {
    echo "test-images.sh: needs root (dockerd, chroot)" >&2
    exit 2
}
# shellcheck source=/dev/null
. "$top/packaging/images/versions"
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
fail() {
    echo "test-images.sh: FAILED: $*" >&2
    tail -n 20 "$work"/*.log >&2
    exit 1
}

work=$(mktemp -d)
dockerd_pid='' bridge=sn-img-$$
clean_up() {
    if [ -n "$dockerd_pid" ]; then
        kill "$dockerd_pid" 2>/dev/null || true
        wait "$dockerd_pid" 2>/dev/null || true
    fi
    ip link del "$bridge" 2>/dev/null || true
    grep -F " $work/" /proc/self/mounts | cut -d' ' -f2 | sort -r | xargs -r umount -l \
        2>/dev/null || true
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT

say "starting an engine in $work"
# The engine shares this machine's network namespace, for pip. It has its own bridge, because
# `--bridge none` would remove docker0 of the machine's engine, and sets no firewall rules. Its
# writes to /etc go to $work.
ip link add "$bridge" type bridge
ip addr add 192.0.2.1/24 dev "$bridge"
mkdir "$work/etc" "$work/etc-work"
echo '{}' >"$work/daemon.json"
# shellcheck disable=SC2016
unshare --mount sh -ec '
    mount -t overlay etc -o lowerdir=/etc,upperdir="$0/etc",workdir="$0/etc-work" /etc
    exec dockerd "$@"' "$work" \
    --config-file "$work/daemon.json" --data-root "$work/data" --exec-root "$work/exec" \
    --pidfile "$work/docker.pid" --host "unix://$work/docker.sock" --bridge "$bridge" \
    --iptables=false --ip6tables=false --ip-forward=false \
    --containerd-namespace "images-$$" --containerd-plugins-namespace "images-$$-plugins" \
    >"$work/dockerd.log" 2>&1 &
dockerd_pid=$!
export DOCKER_HOST=unix://$work/docker.sock
for _ in $(seq 300); do
    docker version >/dev/null 2>&1 && break
    kill -0 "$dockerd_pid" 2>/dev/null || fail "dockerd exited"
    sleep 0.1
done

say "building the base image: Debian's Python with this machine's CA certificates"
mkdir "$work/base"
tar -C "$work/base" -xf "$("$top/packaging/images/base-tar.sh" "$FLOWER")" --exclude=./opt/flower
sed -i '/^app:/d' "$work/base/etc/passwd" "$work/base/etc/group"
rm -rf "$work/base/app"
cp "${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}" \
    "$work/base/etc/ssl/certs/ca-certificates.crt"
export BASE=python:debian
tar -C "$work/base" -c . | docker import \
    --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' - "$BASE" >/dev/null

run_as_agent() {
    docker run --rm --init --network none --read-only --tmpfs /tmp \
        --tmpfs /app/.flwr:uid=49999,gid=49999,mode=0700,exec \
        --cap-drop ALL --security-opt no-new-privileges --pids-limit 1024 \
        --env FLWR_HOME=/app/.flwr "$@"
}
mib() { echo $(($(docker image inspect --format '{{.Size}}' "$1") / 1024 / 1024)); }
for framework in "${frameworks[@]}"; do
    case $framework in
    base) image=flwr/supernode:$FLOWER program='import flwr as framework' ;;
    sklearn)
        image=flower-supernode-sklearn:$FLOWER
        program='import sklearn as framework, sklearn.linear_model'
        ;;
    tensorflow)
        image=flower-supernode-tensorflow:$FLOWER
        program='import tensorflow as framework'
        ;;
    pytorch) image=flower-supernode-pytorch:$FLOWER program='import torch as framework' ;;
    esac
    PIP_TRUSTED_HOST="${PIP_TRUSTED_HOST:-} index.invalid" "$top/packaging/images/build.sh" \
        "$framework" cpu --network host \
        >"$work/build-$framework.log" 2>&1 ||
        fail "cannot build $image"
    version=$(run_as_agent "$image" --version) || fail "$image: flower-supernode --version"
    [[ $version == *"$FLOWER"* ]] || fail "$image contains Flower $version"
    program+='
import flwr, os
assert (os.getuid(), os.getgid(), os.getcwd()) == (49999, 49999, "/app")
# Python uses a .pyc file only if it records the modification time of its source.
with open(flwr.__cached__, "rb") as cached:
    assert int.from_bytes(cached.read(12)[8:], "little") == int(os.stat(flwr.__file__).st_mtime)
print(framework.__name__, framework.__version__)'
    has=$(run_as_agent --entrypoint python3 "$image" -c "$program") \
        || fail "$image: cannot import its framework"
    caches=$(docker run --rm --network none --user 0 --entrypoint find "$image" \
        /root /tmp /app -name '*pip*')
    [ -z "$caches" ] || fail "$image contains a pip cache"
    ! docker history --no-trunc "$image" | grep -q index.invalid \
        || fail "the history of $image contains the package index"
    say "$image: $version, $has, $(mib "$image") MiB, including $(mib "$BASE") MiB base image"
done
