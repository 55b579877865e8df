#!/usr/bin/env bash
# Shell script that `make bench` compares the agent with: an appliance written with the docker CLI,
# nvidia-smi, jq and curl. Steps and container are the agent's. What the agent does beyond that
# (adoption, supervision, diagnosis) is left out, in favour of the script.
#
#   shell-launch.sh CONTEXT SOCKET DAEMON_JSON DATA_DIRECTORY
set -euo pipefail

context=$1 socket=$2 daemon_json=$3 data=$4
export DOCKER_HOST=unix://$socket
name=flower-supernode

# Validate. The context is sourced, as appliances do.
# shellcheck source=/dev/null
. "$context"
[[ ${FL_SUPERLINK_ADDRESS:?} =~ ^[A-Za-z0-9.-]+:[0-9]+$ ]]
[[ ${FL_VERSION:=1.31.0} =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]]
[[ ${FL_FRAMEWORK:=pytorch} =~ ^(pytorch|tensorflow|sklearn)$ ]]
[[ ${FL_GPU_ENABLED:=NO} =~ ^(YES|NO)$ ]]
[[ ${FL_LOG_LEVEL:=INFO} =~ ^(DEBUG|INFO|WARNING|ERROR)$ ]]
image=flower-supernode-$FL_FRAMEWORK:$FL_VERSION

# Wait for Docker.
for _ in {1..60}; do
    [ "$(curl --silent --unix-socket "$socket" http://docker/_ping)" != OK ] || break
    sleep 1
done
docker info --format '{{json .Runtimes}}' >"$data/runtimes.json"

# Detect the GPU and register NVIDIA's runtime in Docker.
gpu=()
if [ "$FL_GPU_ENABLED" = YES ]; then
    uuid=$(nvidia-smi --query-gpu=index,uuid,name,memory.total --format=csv,noheader,nounits |
        cut -d, -f2 | tr -d ' ')
    if [ "$(jq 'has("nvidia")' "$data/runtimes.json")" != true ]; then
        jq '.runtimes.nvidia = {path: "nvidia-container-runtime", runtimeArgs: []}' \
            "$daemon_json" >"$daemon_json.next"
        mv "$daemon_json.next" "$daemon_json"
        systemctl reload docker
    fi
    gpu=(--runtime nvidia --env "NVIDIA_VISIBLE_DEVICES=$uuid"
        --env "NVIDIA_DRIVER_CAPABILITIES=compute,utility")
fi

# Launch.
docker image inspect "$image" >/dev/null
docker rm --force "$name" >/dev/null 2>&1 || true
docker create --name "$name" --user 49999:49999 --init --cap-drop ALL \
    --security-opt no-new-privileges --pids-limit 4096 \
    --log-driver local --tmpfs /tmp --mount "type=bind,source=$data,target=/data,readonly" \
    "${gpu[@]}" "$image" \
    --insecure --superlink "$FL_SUPERLINK_ADDRESS" --isolation subprocess >/dev/null
docker start "$name" >/dev/null

# Wait until the container runs.
until [ "$(docker inspect --format '{{.State.Running}}' "$name")" = true ]; do
    sleep 0.1
done
