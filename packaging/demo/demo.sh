#!/usr/bin/env bash
# `make demo`: runs a SuperNode from an OpenNebula context on this machine, with a real Docker
# engine and a real Flower on both sides. It stops everything it starts and leaves the machine's
# daemon.json unchanged.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent
version=1.31.0
image=flwr/supernode:$version
daemon_json=/etc/docker/daemon.json

build() { (cd "$top" && cargo build --release --locked -p supernode-agent); }

if [ "$(id -u)" != 0 ]; then
    echo "The demo needs root for Docker and network namespaces:" \
        "it installs and builds as $(id -un), then continues with sudo."
    "$top/packaging/install-tools.sh" demo
    mkdir -p "$cache" # owned by the user, not by root
    build
    kept=PATH,HOME,XDG_CACHE_HOME,XDG_CONFIG_HOME,CARGO_TARGET_DIR,SSL_CERT_FILE,PIP_CERT
    kept+=,PIP_CONFIG_FILE,PIP_INDEX_URL,PIP_EXTRA_INDEX_URL
    kept+=,http_proxy,https_proxy,no_proxy,HTTP_PROXY,HTTPS_PROXY,NO_PROXY
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
# wait_for SECONDS ERROR COMMAND…: waits until the command succeeds. Fails with ERROR after SECONDS,
# or when the agent or dockerd exits.
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ -z "$agent_pid" ] || kill -0 "$agent_pid" 2>/dev/null ||
            fail "$what: supernode-agent has exited"
        [ -z "$dockerd_pid" ] || kill -0 "$dockerd_pid" 2>/dev/null ||
            fail "$what: dockerd has exited"
        [ $SECONDS -lt $deadline ] || fail "$what"
        sleep 0.2
    done
}
# progress PROGRESS INPUT COMMAND…: runs the command with INPUT as standard input and its output in
# $work/progress.log. Prints the output of the function PROGRESS meanwhile: in place on a terminal,
# otherwise every 15 s.
progress() {
    local progress_of=$1 input=$2 printed=$SECONDS pid
    shift 2
    set -m # a process group of its own, so that all of it can be killed
    "$@" <"$input" >"$work/progress.log" 2>&1 &
    pid=$!
    set +m
    worker=$pid
    while sleep 0.5 && kill -0 "$pid" 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\r\e[K      %.70s' "$("$progress_of" "$pid")"
        elif [ $((SECONDS - printed)) -ge 15 ]; then
            printed=$SECONDS
            "$progress_of" "$pid" | show
        fi
    done
    [ ! -t 1 ] || printf '\r\e[K'
    worker=''
    wait "$pid"
}
pull_progress() {
    local layers all
    all=$(grep -c 'Pulling fs layer' "$work/progress.log") || true
    layers=$(grep -c 'Pull complete' "$work/progress.log") || true
    echo "pulling: $layers of $all layers complete"
}
build_progress() {
    local last
    last=$(tail -n 1 "$work/progress.log" | sed 's/^ *//')
    echo "building for $((SECONDS - step_began)) s${last:+: $last}"
}
# The open file shares its position with the command.
load_progress() {
    local position size
    position=$(sed -n 's/^pos:[[:space:]]*//p' "/proc/$1/fdinfo/0" 2>/dev/null) || return 0
    size=$(stat -c %s "$tar")
    echo "loading: $((position * 100 / size)) % of $((size / 1024 / 1024)) MiB"
}
fingerprint() { sha256sum "$daemon_json" 2>/dev/null || echo "no $daemon_json"; }

work=$(mktemp -d /tmp/supernode-demo.XXXXXX)
agent_pid='' dockerd_pid='' worker='' namespace='' saved_daemon_json=''
# Containers that clean_up may remove. Empty until an engine is chosen: in the machine's own engine,
# flower-supernode may be a real node.
containers=()
name=flower-supernode
superlink=supernode-demo-superlink
docker_socket=/var/run/docker.sock
docker() { command docker -H "unix://$docker_socket" "$@"; }
# Restores daemon.json of the machine's own engine and reloads the engine.
restore_daemon_json() {
    [ -n "$saved_daemon_json" ] || return 0
    ! cmp -s "$saved_daemon_json" "$daemon_json" || return 0
    cat "$saved_daemon_json" >"$daemon_json"
    "${reload_command[@]}" ||
        say "demo: restored $daemon_json, but '${reload_command[*]}' failed" >&2
}
clean_up() {
    local code=$?
    trap - EXIT INT TERM
    set +e # clean up the rest even if one step fails
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

begin "missing packages"
"$top/packaging/install-tools.sh" demo | show
finish "nothing else is installed"

begin "the agent: cargo build --release"
built=${SUPERNODE_DEMO_BUILT:-}
[ -n "$built" ] || progress build_progress /dev/null build || fail "cannot build the agent"
agent=${CARGO_TARGET_DIR:-$top/target}/release/supernode-agent
agent_version=$("$agent" --version) || fail "cannot run $agent"
finish "$agent_version, $(($(stat -c %s "$agent") / 1024)) KiB${built:+, built $built}"

begin "a Docker engine"
reload_command=(systemctl reload docker.service)
if docker info >/dev/null 2>&1; then
    if [ ! -d /run/systemd/system ] && [ -s /var/run/docker.pid ]; then
        reload_command=(kill -HUP "$(cat /var/run/docker.pid)")
    fi
    name=flower-supernode-demo
    engine_version=$(docker version --format '{{.Server.Version}}')
    finish "the machine's own, $engine_version; container name $name"
    # On a machine with a GPU the agent adds the nvidia runtime; the demo restores the file.
    if [ -e "$daemon_json" ]; then
        cp -p "$daemon_json" "$work/daemon.json.saved"
        saved_daemon_json=$work/daemon.json.saved
        settings_daemon_json=$daemon_json
    else
        # Nothing to restore: the agent gets a file that the engine does not read.
        settings_daemon_json=$work/daemon.json
    fi
else
    say "      none is running: starting one in $work, in a network namespace of its own"
    namespace=supernode-demo-$$
    docker_socket=$work/docker.sock
    settings_daemon_json=$work/daemon.json
    echo '{}' >"$settings_daemon_json"
    ip netns add "$namespace"
    ip -n "$namespace" link set lo up
    # Docker 20.10 writes a key to /etc/docker wherever its configuration is: an overlay redirects
    # writes below /etc to $work.
    mkdir "$work/etc" "$work/etc-work"
    # shellcheck disable=SC2016
    nsenter --net="/run/netns/$namespace" unshare --mount sh -ec \
        'mount -t overlay etc -o lowerdir=/etc,upperdir="$0/etc",workdir="$0/etc-work" /etc
         exec dockerd "$@"' "$work" \
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
    finish "present in the engine"
elif [ -z "$namespace" ] && progress pull_progress /dev/null timeout 120 docker pull "$image"; then
    finish "pulled"
else
    say "      no registry: building it from Debian and Python packages (once, about two minutes)"
    make_tar() { "$top/packaging/images/base-tar.sh" "$version" >"$work/tar"; }
    progress build_progress /dev/null make_tar || fail "cannot build the image"
    tar=$(cat "$work/tar")
    changes=()
    while IFS= read -r change; do changes+=(--change "$change"); done \
        < <("$top/packaging/images/build-base.sh" --changes)
    progress load_progress "$tar" docker import "${changes[@]}" - "$image" ||
        fail "cannot load the image"
    finish "$(($(stat -c %s "$tar") / 1024 / 1024)) MiB"
fi

begin "a SuperLink"
# Both names belong to the demo; an earlier demo that was killed may have left the containers.
containers=("$name" "$superlink")
docker rm -f "${containers[@]}" >/dev/null 2>&1 || true
docker run -d --name "$superlink" --entrypoint flower-superlink -e FLWR_TELEMETRY_ENABLED=0 \
    "$image" --insecure --isolation subprocess >/dev/null
superlink_log() { docker logs "$superlink" 2>&1; }
superlink_is_up() { superlink_log | grep -q 'Fleet API'; }
wait_for 120 "the SuperLink does not start" superlink_is_up
address=$(docker inspect \
    --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$superlink")
finish "Flower $version at $address:9092"

begin "configuration, facts, verdict and container: supernode-agent plan"
mkdir "$work/context"
sed "s/^FL_SUPERLINK_ADDRESS=.*/FL_SUPERLINK_ADDRESS='$address:9092'/" \
    "$top/packaging/examples/context.sh" >"$work/context/context.sh.network"
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
finish "nothing was changed"

begin "the node: supernode-agent run"
"$agent" run --settings "$work/agent.toml" 2>"$work/agent.log" &
agent_pid=$!
verdict_is_logged() {
    grep -Eq 'WARNING no usable GPU|started container|ERROR' "$work/agent.log"
}
wait_for 120 "the agent logs no verdict" verdict_is_logged
node_runs() { [ "$(docker inspect --format '{{.State.Running}}' "$name" 2>&1)" = true ]; }
wait_for 120 "the container is not running" node_runs
start_is_logged() { grep -q 'started container' "$work/agent.log"; }
wait_for 60 "the agent does not log the start of the container" start_is_logged
show <"$work/agent.log"
docker ps --filter "name=^$name\$" --format 'container {{.Names}}: {{.Image}}, {{.Status}}' | show
format='runtime {{.HostConfig.Runtime}}, verdict {{index .Config.Labels "supernode-agent.verdict"}}'
format+=' {{index .Config.Labels "supernode-agent.reason"}}'
finish "$(docker inspect --format "$format" "$name")"

begin "connection to the SuperLink: Flower's log and supernode-agent status"
node_log() { docker logs "$name" 2>&1 | sed 's,\x1b\[[0-9;]*m,,g'; }
node_is_connected() { node_log | grep -q 'SuperNode ID:'; }
wait_for 120 "the SuperNode does not connect" node_is_connected
node_log | grep -E 'SuperNode ID:|Starting Flower SuperNode' | show
status() { "$agent" status --settings "$work/agent.toml"; }
status_is_connected() { status | grep -q '^SuperLink .*, connected'; }
wait_for 60 "supernode-agent status does not report the connection" status_is_connected
status | show
finish "connected"

begin "shutdown: SIGTERM, as sent by systemctl stop"
kill "$agent_pid"
wait "$agent_pid" || fail "the agent exited with $?"
agent_pid=''
docker inspect "$name" --format \
    'container {{.Name}}: running {{.State.Running}}, exit code {{.State.ExitCode}}' | show
[ "$(docker inspect --format '{{.State.Running}}' "$name")" = false ] ||
    fail "the container is still running"
restore_daemon_json
[ "$(fingerprint)" = "$before" ] || fail "$daemon_json has changed"
finish "$daemon_json is unchanged ($before)"

printf '\ndemo: done in %d s\n' $((SECONDS - began))
