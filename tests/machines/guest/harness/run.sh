#!/bin/bash
# Runs the test's script, saves its output, its exit code and the journal, and powers the VM off.
#
# wait_for COMMAND…: repeats the command until it succeeds, for at most a minute.
wait_for() {
    for _ in $(seq 600); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    echo "timed out waiting for: $*"
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
# A VM with its own disk returns the results on a second disk.
out=/dev/disk/by-id/virtio-harness
[ ! -e $out ] || tar -C /harness -cf $out output code journal
systemctl --no-block poweroff
