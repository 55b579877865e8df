#!/bin/sh
# Checks whether this VM can use its GPU. Exits with 1 on an ERROR; --json prints JSON.
# /opt/flower/scripts/validate-gpu.sh is a link to this file.
exec /usr/bin/supernode-agent check vm "$@"
