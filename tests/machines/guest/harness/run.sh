#!/bin/bash
# Runs the test's script, keeps what it said, its exit code and the journal, and powers the machine off.
# wait_for COMMAND…: until it succeeds, at most a minute.
wait_for() {
    for _ in $(seq 600); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    echo "waited for in vain: $*"
    return 1
}
(
    set -eux
    # shellcheck source=/dev/null
    . /harness/script
)
echo $? >/harness/code
journalctl --sync
journalctl --boot --output=json --all --no-pager >/harness/journal
systemctl --no-block poweroff
