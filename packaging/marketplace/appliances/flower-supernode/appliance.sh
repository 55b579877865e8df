#!/usr/bin/env bash
# Flower SuperNode for the appliance framework of OpenNebula/one-apps, sourced by
# /etc/one-appliance/service.
#
# The image build installs Docker, supernode-agent, a Flower image and optionally the NVIDIA driver
# and the NVIDIA Container Toolkit. At boot flower-supernode.service reads the context and runs the
# node; this script only waits for it and writes the report.
#
# From the environment of the build:
#   SUPERNODE_AGENT_DEB   package (/opt/one-appliance/supernode-agent.deb)
#   FLOWER_VERSION        Flower release of the image (1.31.0)
#   NVIDIA=YES            also installs the NVIDIA driver and the NVIDIA Container Toolkit (Debian)
# shellcheck disable=SC2034  # The framework reads the variables.

# The framework runs configure and bootstrap again at each boot and when the context changes.
ONE_SERVICE_RECONFIGURABLE=true

# from the table of variables, agent/src/config/variables.rs
ONE_SERVICE_PARAMS=(
    'ONEAPP_FL_GPU_ENABLED' 'configure' 'Use the assigned GPU' 'O|boolean|Use the assigned GPU| |NO'
    'ONEAPP_FL_GPU_REQUIRED' 'configure' 'Fail instead of falling back to the CPU' 'O|boolean|Fail instead of falling back to the CPU| |NO'
    'ONEAPP_FL_CUDA_VISIBLE_DEVICES' 'configure' 'GPUs for the node' 'O|text|GPUs for the node| |'
    'ONEAPP_FL_GPU_MEMORY_FRACTION' 'configure' 'Fraction of the GPU'\''s memory that the framework may use' 'O|number-float|Fraction of the GPU'\''s memory that the framework may use| |'
    'ONEAPP_FL_DCGM_ENABLED' 'configure' 'Export GPU metrics' 'O|boolean|Export GPU metrics| |NO'
    'ONEAPP_FLOWER_VERSION' 'configure' 'Flower release' 'O|text|Flower release| |'
    'ONEAPP_FL_FRAMEWORK' 'configure' 'Machine-learning framework' 'O|list|Machine-learning framework|,pytorch,tensorflow,sklearn,base|'
    'ONEAPP_FL_SUPERNODE_IMAGE' 'configure' 'The operator'\''s own image' 'O|text|The operator'\''s own image| |'
    'ONEAPP_FL_SUPERLINK_ADDRESS' 'configure' 'Address of the SuperLink' 'O|text|Address of the SuperLink| |'
    'ONEAPP_FL_NODE_CONFIG' 'configure' 'Node configuration for the ClientApp' 'O|text|Node configuration for the ClientApp| |'
    'ONEAPP_FL_MAX_RETRIES' 'configure' 'Attempts to connect to the SuperLink' 'O|number|Attempts to connect to the SuperLink| |0'
    'ONEAPP_FL_MAX_WAIT_TIME' 'configure' 'Seconds to keep trying to connect to the SuperLink' 'O|number|Seconds to keep trying to connect to the SuperLink| |0'
    'ONEAPP_FL_ISOLATION' 'configure' 'Where the ClientApp runs' 'O|list|Where the ClientApp runs|subprocess,process|subprocess'
    'ONEAPP_FL_LOG_LEVEL' 'configure' 'Lowest severity that is logged' 'O|list|Lowest severity that is logged|DEBUG,INFO,WARNING,ERROR|INFO'
    'ONEAPP_FL_LOG_FORMAT' 'configure' 'Format of the agent'\''s log' 'O|list|Format of the agent'\''s log|text,json|text'
    'ONEAPP_FL_TLS_ENABLED' 'configure' 'Connect to the SuperLink with TLS' 'O|list|Connect to the SuperLink with TLS|,YES,NO|'
    'ONEAPP_FL_SSL_CA_CERTFILE' 'configure' 'Certificate of the SuperLink'\''s CA' 'O|text64|Certificate of the SuperLink'\''s CA| |'
    'ONEAPP_FL_GRPC_KEEPALIVE_TIME' 'configure' 'Seconds between gRPC keepalive pings' 'O|number|Seconds between gRPC keepalive pings| |60'
    'ONEAPP_FL_GRPC_KEEPALIVE_TIMEOUT' 'configure' 'Seconds to wait for a ping response; less than the time between pings' 'O|number|Seconds to wait for a ping response; less than the time between pings| |20'
    'ONEAPP_FL_EDGE_BACKOFF' 'configure' 'Backoff of the discovery' 'O|list|Backoff of the discovery|exponential,fixed|exponential'
    'ONEAPP_FL_EDGE_MAX_BACKOFF' 'configure' 'Maximum delay between discovery attempts, in seconds' 'O|number|Maximum delay between discovery attempts, in seconds| |300'
)
# end

UNIT=flower-supernode.service

service_install() {
    local package=${SUPERNODE_AGENT_DEB:-/opt/one-appliance/supernode-agent.deb}
    local version=${FLOWER_VERSION:-1.31.0}
    if [ ! -s "$package" ]; then
        msg error "no package at $package: run make deb and set SUPERNODE_AGENT_DEB to its result"
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
    # Do not start the node in the build VM.
    systemctl mask --runtime "$UNIT"
    # apt treats an argument with a slash as a file. That its user _apt cannot read it is harmless.
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

# The same commands as the agent's fixes for driver-not-loaded and runtime-missing.
install_nvidia() {
    local archive=https://nvidia.github.io/libnvidia-container
    local key=/etc/apt/keyrings/nvidia-container-toolkit.asc
    local list=/etc/apt/sources.list.d/nvidia-container-toolkit.list
    msg info "NVIDIA driver and NVIDIA Container Toolkit"
    local components='main contrib non-free non-free-firmware'
    find /etc/apt -name '*.sources' -exec sed -i "s/^Components:.*/Components: $components/" {} +
    find /etc/apt -name '*.list' -exec sed -i "/^deb /s/ main.*/ $components/" {} +
    install -d -m 0755 /etc/apt/keyrings
    curl -fsSL "$archive/gpgkey" -o "$key"
    # shellcheck disable=SC2016  # apt expands ARCH.
    echo "deb [signed-by=$key] $archive/stable/deb/\$(ARCH) /" >"$list"
    chmod 0644 "$key" "$list"
    apt-get update -q
    apt-get install -q -y --no-install-recommends \
        linux-headers-amd64 nvidia-driver nvidia-persistenced nvidia-container-toolkit
}

service_configure() {
    # At boot the node already runs and reads the same context again; after onevm updateconf it
    # reads the new one.
    systemctl reload-or-restart "$UNIT" ||
        msg warning "$UNIT did not start: see journalctl -u $UNIT"
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
    echo 'Parameters: supernode-agent variables. State of the node: supernode-agent status.'
}

service_cleanup() {
    :
}

# The output of the agent contains no secrets.
write_report() {
    {
        echo '[Flower SuperNode]'
        echo "unit = $(systemctl is-active "$UNIT" || true)"
        echo "agent = $(supernode-agent --version || true)"
        supernode-agent status || true
    } >"$ONE_SERVICE_REPORT" 2>&1
    chmod 0600 "$ONE_SERVICE_REPORT"
}
