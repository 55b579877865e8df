#!/bin/sh
# This VM, checked for the use of its GPU: exit 1 where an ERROR is found; --json for a program.
# /opt/flower/scripts/validate-gpu.sh links here.
exec /usr/bin/supernode-agent check vm "$@"
