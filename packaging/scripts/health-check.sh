#!/bin/sh
# Exits with 0 while the SuperNode's container runs, else prints one line with the reason. The VM
# templates set READY_SCRIPT_PATH to /opt/flower/scripts/health-check.sh, a link to this file.
exec /usr/bin/supernode-agent status --ready
