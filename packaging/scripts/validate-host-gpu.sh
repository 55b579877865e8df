#!/bin/sh
# This KVM host, checked for passing its GPUs through: exit 1 where an ERROR is found; --json for a program.
# /opt/flower/scripts/validate-host-gpu.sh links here.
# Copied to a host together with /usr/bin/supernode-agent it needs nothing else of the package.
exec /usr/bin/supernode-agent check host "$@"
