#!/usr/bin/env bash
# `make test`: every test there is, a line per step with its duration, and at the end what was skipped and why.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
step() {
    local began=$SECONDS what=$1
    shift
    printf '== %s\n' "$what"
    "$@"
    printf '== %s: %d s\n\n' "$what" $((SECONDS - began))
}
rust_tests() {
    # Most of their time they wait: twice as many at once as there are processors.
    : "${RUST_TEST_THREADS:=$((2 * $(nproc)))}"
    export RUST_TEST_THREADS
    # --nocapture would mix the tests' lines; the lines of skipped tests come through --show-output.
    RUST_BACKTRACE=0 cargo test --workspace --locked --quiet --no-fail-fast -- --show-output 2>&1 | tee -a "$log"
}
# The machines that boot have it as dpkg installs it.
build_package() {
    SUPERNODE_DEB=$(realpath "$(packaging/build-deb.sh)")
    export SUPERNODE_DEB
    printf '   %s, %d KiB\n' "$(basename "$SUPERNODE_DEB")" $(($(stat -c %s "$SUPERNODE_DEB") / 1024))
}
# Tests that need root and Docker say SKIPPED where they cannot run.
step "what this machine lacks" packaging/install-tools.sh test
step "build" cargo build --workspace --locked --quiet
step "the package" build_package
step "lintian" lintian --fail-on error,warning --tag-display-limit 0 --allow-root "$SUPERNODE_DEB"
step "tests of the code, on simulators, real engines, real files and machines that boot" rust_tests
# Real frameworks are made in the cache by the first run; where one cannot be had, SKIPPED.
python_tests() {
    python3 -m unittest discover -q -s "$1" 2>&1 | tee -a "$log"
}
step "tests of the site hook, on simulators and real frameworks" python_tests packaging/site
step "tests of the dashboard" python_tests packaging/grafana

# Each cause of a node on the CPU: its code, the seconds from the agent's start to the WARNING, and how it was produced.
if grep -q 'CAUSE ' "$log"; then
    printf '== causes of a node on the CPU: the code, the time to the WARNING, how it was produced\n'
    grep -ho 'CAUSE .*' "$log" | sed 's/^CAUSE /   /' | sort
    printf '   %d causes, %d codes\n' "$(grep -c 'CAUSE ' "$log")" \
        "$(grep -ho 'CAUSE [a-z-]*' "$log" | sort -u | wc -l)"
fi
# Each fault: what happened, whether what must hold did, the seconds until the node was well again.
if grep -q 'FAULT ' "$log"; then
    printf '== faults: what happened, the seconds until the node was well again, what must hold\n'
    grep -ho 'FAULT .*' "$log" | sed 's/^FAULT /   /' | sort
fi
if grep -q MEASURED "$log"; then
    printf '== measured\n'
    # Of what grows from test to test, the last.
    grep -ho 'MEASURED.*' "$log" | awk '/so far/ { last = $0; next } { print } END { if (last) print last }'
fi
if grep -q SKIPPED "$log"; then
    printf '== skipped\n'
    grep -h SKIPPED "$log" | sort | uniq -c
else
    printf '== nothing was skipped\n'
fi
