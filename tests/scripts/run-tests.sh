#!/usr/bin/env bash
# `make test`: runs all tests, prints each step with its duration, and finally the tables of causes
# and faults, measurements, and skipped tests with reasons.
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
    # Tests mostly wait, so run twice as many in parallel as there are processors.
    : "${RUST_TEST_THREADS:=$((2 * $(nproc)))}"
    export RUST_TEST_THREADS
    # --nocapture would interleave the tests' output; --show-output prints the lines of passing
    # tests.
    RUST_BACKTRACE=0 cargo test --workspace --locked --quiet --no-fail-fast -- --show-output 2>&1 \
        | tee -a "$log"
}
# Booted VMs need the package for dpkg.
build_package() {
    SUPERNODE_DEB=$(realpath "$(packaging/build-deb.sh)")
    export SUPERNODE_DEB
    printf '   %s, %d KiB\n' "$(basename "$SUPERNODE_DEB")" \
        $(($(stat -c %s "$SUPERNODE_DEB") / 1024))
}
# Tests that need root or Docker print SKIPPED if they cannot run.
step "install missing tools" packaging/install-tools.sh test
step "build" cargo build --workspace --locked --quiet
step "package" build_package
step "lintian" lintian --fail-on error,warning --tag-display-limit 0 --allow-root "$SUPERNODE_DEB"
step "Rust tests: units, documents, end to end on Docker engines, booted VMs" rust_tests
# The first run installs the real frameworks in the cache, or prints SKIPPED.
python_tests() {
    python3 -m unittest discover -q -s "$1" 2>&1 | tee -a "$log"
}
step "site hook tests: simulated and real frameworks" python_tests packaging/site
step "dashboard tests" python_tests packaging/grafana

# One line per cause of a CPU fallback.
if grep -q 'CAUSE ' "$log"; then
    printf '== CPU fallback causes: reason code, seconds from start to WARNING, how produced\n'
    grep -ho 'CAUSE .*' "$log" | sed 's/^CAUSE /   /' | sort
    printf '   %d causes, %d reason codes\n' "$(grep -c 'CAUSE ' "$log")" \
        "$(grep -ho 'CAUSE [a-z-]*' "$log" | sort -u | wc -l)"
fi
# One line per injected fault.
if grep -q 'FAULT ' "$log"; then
    printf '== faults: injected fault, result, seconds to recovery, expected behaviour\n'
    grep -ho 'FAULT .*' "$log" | sed 's/^FAULT /   /' | sort
fi
if grep -q MEASURED "$log"; then
    printf '== measurements\n'
    # Of a running maximum, keep only the last line.
    grep -ho 'MEASURED.*' "$log" |
        awk '/so far/ { last = $0; next } { print } END { if (last) print last }'
fi
if grep -q SKIPPED "$log"; then
    printf '== skipped\n'
    grep -h SKIPPED "$log" | sort | uniq -c
else
    printf '== no test was skipped\n'
fi
