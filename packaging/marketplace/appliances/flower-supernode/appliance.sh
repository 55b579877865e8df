#!/usr/bin/env bash
# The Flower SuperNode for the appliance frame of OpenNebula/one-apps (/etc/one-appliance/service sources this file).
#
# Once, when the image is built, it installs Docker, supernode-agent, a Flower image and, where asked, NVIDIA's driver and
# container toolkit. At boot there is nothing left to do: flower-supernode.service reads the context and runs the node, and
# this only waits for it and writes the report.
#
# From the environment of the build:
#   SUPERNODE_AGENT_DEB   the package (/opt/one-appliance/supernode-agent.deb)
#   FLOWER_VERSION        what the Flower image has (1.31.0)
#   NVIDIA=YES            driver and container toolkit as well (Debian)
# shellcheck disable=SC2034  # The frame reads what is set here.

# At each boot, and when the context changes, the frame goes through configure and bootstrap again.
ONE_SERVICE_RECONFIGURABLE=true

# from the table of variables, agent/src/config/variables.rs
ONE_SERVICE_PARAMS=(
    'ONEAPP_FL_GPU_ENABLED' 'configure' 'Use the passed-through GPU' 'O|boolean|Use the passed-through GPU| |NO'
    'ONEAPP_FL_GPU_REQUIRED' 'configure' 'Fail instead of falling back to the CPU' 'O|boolean|Fail instead of falling back to the CPU| |NO'
    'ONEAPP_FL_CUDA_VISIBLE_DEVICES' 'configure' 'GPUs for the node' 'O|text|GPUs for the node| |'
    'ONEAPP_FL_GPU_MEMORY_FRACTION' 'configure' 'Share of the GPU'\''s memory that the framework may take' 'O|number-float|Share of the GPU'\''s memory that the framework may take| |'
    'ONEAPP_FL_DCGM_ENABLED' 'configure' 'Export GPU metrics' 'O|boolean|Export GPU metrics| |NO'
    'ONEAPP_FLOWER_VERSION' 'configure' 'Release of Flower' 'O|text|Release of Flower| |'
    'ONEAPP_FL_FRAMEWORK' 'configure' 'Machine-learning framework' 'O|list|Machine-learning framework|,pytorch,tensorflow,sklearn,base|'
    'ONEAPP_FL_SUPERNODE_IMAGE' 'configure' 'Image of the operator'\''s own' 'O|text|Image of the operator'\''s own| |'
    'ONEAPP_FL_SUPERLINK_ADDRESS' 'configure' 'Address of the SuperLink' 'O|text|Address of the SuperLink| |'
    'ONEAPP_FL_NODE_CONFIG' 'configure' 'Configuration of the node for its ClientApp' 'O|text|Configuration of the node for its ClientApp| |'
    'ONEAPP_FL_MAX_RETRIES' 'configure' 'Attempts to connect to the SuperLink' 'O|number|Attempts to connect to the SuperLink| |0'
    'ONEAPP_FL_MAX_WAIT_TIME' 'configure' 'Seconds of attempts to connect to the SuperLink' 'O|number|Seconds of attempts to connect to the SuperLink| |0'
    'ONEAPP_FL_ISOLATION' 'configure' 'Where the ClientApp runs' 'O|list|Where the ClientApp runs|subprocess,process|subprocess'
    'ONEAPP_FL_LOG_LEVEL' 'configure' 'Least severity that is logged' 'O|list|Least severity that is logged|DEBUG,INFO,WARNING,ERROR|INFO'
    'ONEAPP_FL_LOG_FORMAT' 'configure' 'Format of the agent'\''s log' 'O|list|Format of the agent'\''s log|text,json|text'
    'ONEAPP_FL_TLS_ENABLED' 'configure' 'Speak TLS with the SuperLink' 'O|list|Speak TLS with the SuperLink|,YES,NO|'
    'ONEAPP_FL_SSL_CA_CERTFILE' 'configure' 'Certificate of the SuperLink'\''s CA' 'O|text64|Certificate of the SuperLink'\''s CA| |'
    'ONEAPP_FL_GRPC_KEEPALIVE_TIME' 'configure' 'Seconds between gRPC keepalive pings' 'O|number|Seconds between gRPC keepalive pings| |60'
    'ONEAPP_FL_GRPC_KEEPALIVE_TIMEOUT' 'configure' 'Seconds to wait for a ping'\''s answer; less than the time between pings' 'O|number|Seconds to wait for a ping'\''s answer; less than the time between pings| |20'
    'ONEAPP_FL_EDGE_BACKOFF' 'configure' 'How discovery is tried again' 'O|list|How discovery is tried again|exponential,fixed|exponential'
    'ONEAPP_FL_EDGE_MAX_BACKOFF' 'configure' 'Longest pause of the discovery in seconds' 'O|number|Longest pause of the discovery in seconds| |300'
)
# end

UNIT=flower-supernode.service

service_install() {
    local package=${SUPERNODE_AGENT_DEB:-/opt/one-appliance/supernode-agent.deb} version=${FLOWER_VERSION:-1.31.0}
    if [ ! -s "$package" ]; then
        msg error "there is no package at $package: build it (make deb) and name it by SUPERNODE_AGENT_DEB"
        return 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    msg info "Docker"
    apt-get update -q
    apt-get install -q -y docker.io ca-certificates curl
    if [ "${NVIDIA:-NO}" = YES ]; then
        install_nvidia
    fi
    msg info "supernode-agent"
    # The machine that builds is no node.
    systemctl mask --runtime "$UNIT"
    # apt takes a file for one only by a path with a slash. Its user, _apt, may not read the folder, which is no harm.
    apt-get install -q -y --no-install-recommends "$(realpath "$package")"
    rm -f "$package"
    msg info "Flower $version"
    docker pull "flwr/supernode:$version"
    install -d -m 0755 /opt/flower
    echo "$version" >/opt/flower/PREBAKED_VERSION
    echo base >/opt/flower/PREBAKED_FRAMEWORK
    chmod 0644 /opt/flower/PREBAKED_*
    apt-get clean
    rm -rf /var/lib/apt/lists/*
}

# As the agent's own fixes for driver-not-loaded and runtime-missing tell it.
install_nvidia() {
    local archive=https://nvidia.github.io/libnvidia-container key=/etc/apt/keyrings/nvidia-container-toolkit.asc
    local list=/etc/apt/sources.list.d/nvidia-container-toolkit.list
    msg info "NVIDIA's driver and container toolkit"
    find /etc/apt -name '*.sources' -exec sed -i 's/^Components:.*/Components: main contrib non-free non-free-firmware/' {} +
    find /etc/apt -name '*.list' -exec sed -i '/^deb /s/ main.*/ main contrib non-free non-free-firmware/' {} +
    install -d -m 0755 /etc/apt/keyrings
    curl -fsSL "$archive/gpgkey" -o "$key"
    # shellcheck disable=SC2016  # apt puts the architecture there.
    echo "deb [signed-by=$key] $archive/stable/deb/\$(ARCH) /" >"$list"
    chmod 0644 "$key" "$list"
    apt-get update -q
    apt-get install -q -y --no-install-recommends linux-headers-amd64 nvidia-driver nvidia-persistenced nvidia-container-toolkit
}

service_configure() {
    # At boot the node runs by now, and reads the same again; after onevm updateconf it reads what is new.
    systemctl reload-or-restart "$UNIT" || msg warning "$UNIT did not start; journalctl -u $UNIT tells why"
    write_report
}

service_bootstrap() {
    local why limit=$((SECONDS + ${READY_SECONDS:-600}))
    until why=$(supernode-agent status --ready 2>&1); do
        if systemctl is-failed --quiet "$UNIT" || [ "$SECONDS" -ge "$limit" ]; then
            write_report
            msg error "the SuperNode does not run: $why"
            return 1
        fi
        sleep 5
    done
    write_report
}

service_help() {
    default_service_help
    echo
    echo 'supernode-agent variables explains the parameters, supernode-agent status shows the node.'
}

service_cleanup() {
    :
}

# No secret is in what the agent shows of itself.
write_report() {
    {
        echo '[Flower SuperNode]'
        echo "unit = $(systemctl is-active "$UNIT" || true)"
        echo "agent = $(supernode-agent --version || true)"
        supernode-agent status || true
    } >"$ONE_SERVICE_REPORT" 2>&1
    chmod 0600 "$ONE_SERVICE_REPORT"
}
