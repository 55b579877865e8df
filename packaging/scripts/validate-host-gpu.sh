#!/bin/sh
# Checks whether this KVM host can pass its GPUs through. Exits with 1 on an ERROR; --json prints
# JSON. /opt/flower/scripts/validate-host-gpu.sh is a link to this file. A host needs only this file
# and /usr/bin/supernode-agent.
exec /usr/bin/supernode-agent check host "$@"
