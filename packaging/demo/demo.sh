#!/usr/bin/env bash
# `make demo`: a SuperNode from an OpenNebula context, on this machine, with a real Docker engine and a real Flower on both
# sides. Everything it starts it stops again; the machine's daemon.json stays what it is.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent
version=1.31.0
image=flwr/supernode:$version
daemon_json=/etc/docker/daemon.json

build() { (cd "$top" && cargo build --release --locked -p supernode-agent); }

if [ "$(id -u)" != 0 ]; then
    echo "The demo needs root for Docker and network namespaces: it installs and builds as you, and goes on by sudo."
    "$top/packaging/install-tools.sh" demo
    mkdir -p "$cache" # by the user, who keeps other things there
    build
    kept=PATH,HOME,XDG_CACHE_HOME,XDG_CONFIG_HOME,CARGO_TARGET_DIR,SSL_CERT_FILE,PIP_CERT,PIP_CONFIG_FILE,PIP_INDEX_URL
    kept+=,PIP_EXTRA_INDEX_URL,http_proxy,https_proxy,no_proxy,HTTP_PROXY,HTTPS_PROXY,NO_PROXY
    exec sudo --preserve-env="$kept" SUPERNODE_DEMO_BUILT="by $(id -un) in $SECONDS s" "$0" "$@"
fi

steps=9
step=0
began=$SECONDS
step_began=$SECONDS
say() { printf '%s\n' "$*"; }
begin() {
    step=$((step + 1))
    step_began=$SECONDS
    printf '\n[%d/%d] %s\n' "$step" "$steps" "$*"
}
finish() { printf '      %s (%d s)\n' "$*" $((SECONDS - step_began)); }
show() { sed 's/^/      /'; }
fail() {
    say "demo: FAILED: $*" >&2
    exit 1
}
show_logs() {
    local container log
    for container in "${containers[@]}"; do
        docker logs --tail 30 "$container" >"$work/container-$container.log" 2>&1 || true
    done
    for log in "$work"/*.log; do
        [ -s "$log" ] || continue
        say "--- $(basename "$log")"
        tail -n 30 "$log"
    done
}
# wait_for SECONDS WHAT COMMAND…: until the command succeeds; not longer than what we started lives.
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ -z "$agent_pid" ] || kill -0 "$agent_pid" 2>/dev/null || fail "$what: supernode-agent has ended"
        [ -z "$dockerd_pid" ] || kill -0 "$dockerd_pid" 2>/dev/null || fail "$what: dockerd has ended"
        [ $SECONDS -lt $deadline ] || fail "$what"
        sleep 0.2
    done
}
# progress HOW_FAR INPUT COMMAND…: the command, with INPUT as its input and $work/progress.log for its words. Meanwhile HOW_FAR
# says how far it is: in place on a terminal, elsewhere now and then.
progress() {
    local how_far=$1 input=$2 told=$SECONDS pid
    shift 2
    set -m # a process group of its own, which ends as a whole
    "$@" <"$input" >"$work/progress.log" 2>&1 &
    pid=$!
    set +m
    worker=$pid
    while sleep 0.5 && kill -0 "$pid" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\e[K      %.70s' "$("$how_far" "$pid")"
        elif [ $((SECONDS - told)) -ge 15 ]; then
            told=$SECONDS
            "$how_far" "$pid" | show
        fi
    done
    [ ! -t 1 ] || printf '\r\e[K'
    worker=''
    wait "$pid"
}
how_far_is_pull() {
    local layers all
    all=$(grep -c 'Pulling fs layer' "$work/progress.log") || true
    layers=$(grep -c 'Pull complete' "$work/progress.log") || true
    echo "pulling: $layers of $all layers are here"
}
how_far_is_build() {
    local last
    last=$(tail -n 1 "$work/progress.log" | sed 's/^ *//')
    echo "building, for $((SECONDS - step_began)) s${last:+: $last}"
}
# Our file and the command's have one position.
how_far_is_load() {
    local position
    position=$(sed -n 's/^pos:[[:space:]]*//p' "/proc/$1/fdinfo/0" 2>/dev/null) || return 0
    echo "loading: $((position * 100 / $(stat -c %s "$tar"))) % of $(($(stat -c %s "$tar") / 1024 / 1024)) MiB"
}
fingerprint() { sha256sum "$daemon_json" 2>/dev/null || echo "no $daemon_json"; }

work=$(mktemp -d /tmp/supernode-demo.XXXXXX)
agent_pid='' dockerd_pid='' worker='' namespace='' saved_daemon_json=''
# What clean_up may remove. Empty until an engine is chosen: on the machine's own, flower-supernode is somebody's node.
containers=()
name=flower-supernode
superlink=supernode-demo-superlink
docker_socket=/var/run/docker.sock
docker() { command docker -H "unix://$docker_socket" "$@"; }
# Puts the file of the machine's own engine back and has it read again.
restore_daemon_json() {
    [ -n "$saved_daemon_json" ] || return 0
    ! cmp -s "$saved_daemon_json" "$daemon_json" || return 0
    cat "$saved_daemon_json" >"$daemon_json"
    "${reload_command[@]}" || say "demo: $daemon_json is put back, but '${reload_command[*]}' failed" >&2
}
clean_up() {
    local code=$?
    trap - EXIT INT TERM
    set +e # whatever fails here, the rest is cleaned up
    [ "$code" = 0 ] || [ "$code" = 130 ] || show_logs >&2
    [ -z "$worker" ] || kill -- "-$worker" 2>/dev/null
    if [ -n "$agent_pid" ]; then
        kill "$agent_pid" 2>/dev/null
        wait "$agent_pid" 2>/dev/null
    fi
    [ ${#containers[@]} = 0 ] || docker rm -f "${containers[@]}" >/dev/null 2>&1
    if [ -n "$dockerd_pid" ]; then
        kill "$dockerd_pid" 2>/dev/null
        wait "$dockerd_pid" 2>/dev/null
    fi
    [ -z "$namespace" ] || ip netns del "$namespace" 2>/dev/null
    restore_daemon_json
    grep -F " $work/" /proc/self/mounts | cut -d' ' -f2 | sort -r | xargs -r umount -l 2>/dev/null
    rm -rf --one-file-system "$work"
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

before=$(fingerprint)

begin "what this machine lacks"
"$top/packaging/install-tools.sh" demo | show
finish "nothing else is installed"

begin "the agent (cargo build --release)"
built=${SUPERNODE_DEMO_BUILT:-}
[ -n "$built" ] || progress how_far_is_build /dev/null build || fail "the agent was not built"
agent=${CARGO_TARGET_DIR:-$top/target}/release/supernode-agent
agent_version=$("$agent" --version) || fail "$agent does not run"
finish "$agent_version, $(($(stat -c %s "$agent") / 1024)) KiB${built:+, built $built}"

begin "a Docker engine"
reload_command=(systemctl reload docker.service)
if docker info >/dev/null 2>&1; then
    if [ ! -d /run/systemd/system ] && [ -s /var/run/docker.pid ]; then
        reload_command=(kill -HUP "$(cat /var/run/docker.pid)")
    fi
    name=flower-supernode-demo
    finish "the machine's own, $(docker version --format '{{.Server.Version}}'); the container is called $name there"
    # On a machine with a GPU the agent adds the nvidia runtime; afterwards the file is put back.
    if [ -e "$daemon_json" ]; then
        cp -p "$daemon_json" "$work/daemon.json.saved"
        saved_daemon_json=$work/daemon.json.saved
        settings_daemon_json=$daemon_json
    else
        # Nothing to put back: the agent gets a file that the engine does not read.
        settings_daemon_json=$work/daemon.json
    fi
else
    say "      none runs: starting one in $work, in a network namespace of its own"
    namespace=supernode-demo-$$
    docker_socket=$work/docker.sock
    settings_daemon_json=$work/daemon.json
    echo '{}' >"$settings_daemon_json"
    ip netns add "$namespace"
    ip -n "$namespace" link set lo up
    # Docker 20.10 keeps a key in /etc/docker, wherever its configuration is: what it writes to /etc goes to $work.
    mkdir "$work/etc" "$work/etc-work"
    # shellcheck disable=SC2016
    nsenter --net="/run/netns/$namespace" unshare --mount sh -ec \
        'mount -t overlay etc -o lowerdir=/etc,upperdir="$0/etc",workdir="$0/etc-work" /etc; exec dockerd "$@"' "$work" \
        --config-file "$settings_daemon_json" --data-root "$work/data" \
        --exec-root "$work/exec" --pidfile "$work/docker.pid" -H "unix://$docker_socket" \
        --containerd-namespace "$namespace" --containerd-plugins-namespace "$namespace-plugins" \
        >"$work/dockerd.log" 2>&1 &
    dockerd_pid=$!
    wait_for 60 "dockerd does not answer" docker info
    reload_command=(kill -HUP "$dockerd_pid")
    finish "$(docker version --format '{{.Server.Version}}')"
fi

begin "the image $image, with a real Flower"
if docker image inspect "$image" >/dev/null 2>&1; then
    finish "the engine has it"
elif [ -z "$namespace" ] && progress how_far_is_pull /dev/null timeout 120 docker pull "$image"; then
    finish "pulled"
else
    say "      no registry: it is made of the distribution's packages and Python's (once, about two minutes)"
    make_tar() { "$top/packaging/images/base-tar.sh" "$version" >"$work/tar"; }
    progress how_far_is_build /dev/null make_tar || fail "the image was not built"
    tar=$(cat "$work/tar")
    changes=()
    while IFS= read -r change; do changes+=(--change "$change"); done < <("$top/packaging/images/build-base.sh" --changes)
    progress how_far_is_load "$tar" docker import "${changes[@]}" - "$image" || fail "the image was not loaded"
    finish "$(($(stat -c %s "$tar") / 1024 / 1024)) MiB"
fi

begin "a SuperLink"
# From here on both names are ours; a demo that was killed may have left them.
containers=("$name" "$superlink")
docker rm -f "${containers[@]}" >/dev/null 2>&1 || true
docker run -d --name "$superlink" --entrypoint flower-superlink -e FLWR_TELEMETRY_ENABLED=0 "$image" \
    --insecure --isolation subprocess >/dev/null
superlink_log() { docker logs "$superlink" 2>&1; }
superlink_is_up() { superlink_log | grep -q 'Fleet API'; }
wait_for 120 "the SuperLink does not come up" superlink_is_up
address=$(docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$superlink")
finish "Flower $version at $address:9092"

begin "the configuration, the facts, the verdict and the container: supernode-agent plan"
mkdir "$work/context"
sed "s/^FL_SUPERLINK_ADDRESS=.*/FL_SUPERLINK_ADDRESS='$address:9092'/" "$top/packaging/examples/context.sh" \
    >"$work/context/context.sh.network"
cat >"$work/agent.toml" <<SETTINGS
[context]
dir = "$work/context"
[gpu]
wait_seconds = 2
[docker]
socket = "$docker_socket"
daemon_json = "$settings_daemon_json"
reload_command = [$(printf '"%s", ' "${reload_command[@]}")]
[container]
name = "$name"
data_dir = "$work/train"
certs_dir = "$work/certs"
prebaked_dir = "$work"
[state]
dir = "$work/state"
SETTINGS
"$agent" plan --settings "$work/agent.toml" | show
finish "nothing was touched"

begin "the node: supernode-agent run"
"$agent" run --settings "$work/agent.toml" 2>"$work/agent.log" &
agent_pid=$!
agent_is_decided() { grep -Eq 'WARNING No usable GPU|started the container|ERROR' "$work/agent.log"; }
wait_for 120 "the agent says nothing" agent_is_decided
node_runs() { [ "$(docker inspect --format '{{.State.Running}}' "$name" 2>&1)" = true ]; }
wait_for 120 "the container does not run" node_runs
container_is_told() { grep -q 'started the container' "$work/agent.log"; }
wait_for 60 "the agent did not start the container" container_is_told
show <"$work/agent.log"
docker ps --filter "name=^$name\$" --format 'container {{.Names}}: {{.Image}}, {{.Status}}' | show
finish "$(docker inspect --format 'runtime {{.HostConfig.Runtime}}, verdict {{index .Config.Labels "supernode-agent.verdict"}} {{index .Config.Labels "supernode-agent.reason"}}' "$name")"

begin "Flower's own word that it is connected, and supernode-agent status"
node_log() { docker logs "$name" 2>&1 | sed 's,\x1b\[[0-9;]*m,,g'; }
node_is_connected() { node_log | grep -q 'SuperNode ID:'; }
wait_for 120 "the SuperNode does not connect" node_is_connected
node_log | grep -E 'SuperNode ID:|Starting Flower SuperNode' | show
status() { "$agent" status --settings "$work/agent.toml"; }
agent_is_told() { status | grep -q '^SuperLink .*, connected'; }
wait_for 60 "supernode-agent status does not tell that it is connected" agent_is_told
status | show
finish "connected"

begin "the end: SIGTERM, as systemctl stop sends it"
kill "$agent_pid"
wait "$agent_pid" || fail "the agent ended with $?"
agent_pid=''
docker inspect --format 'container {{.Name}}: running {{.State.Running}}, exit code {{.State.ExitCode}}' "$name" | show
[ "$(docker inspect --format '{{.State.Running}}' "$name")" = false ] || fail "the container still runs"
restore_daemon_json
[ "$(fingerprint)" = "$before" ] || fail "$daemon_json is not what it was"
finish "$daemon_json is as it was ($before)"

printf '\ndemo: done in %d s\n' $((SECONDS - began))
