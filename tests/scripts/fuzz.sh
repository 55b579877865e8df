#!/usr/bin/env bash
# `make fuzz`: runs every fuzz target for FUZZ_SECONDS (300), one per processor at a time, and
# prints the number of executions. A crash fails the run and prints how to reproduce it. The corpus
# is kept in the cache and extended by each run. FUZZ_SEED makes a run reproducible.
#
#   fuzz.sh [TARGET…]
#
# Does not need cargo-fuzz: the instrumentation is LLVM's, which the stable compiler includes. There
# is no AddressSanitizer because the code under test is safe Rust; overflows and failed debug
# assertions are findings.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../fuzz"
seconds=${FUZZ_SECONDS:-300}
seed=${FUZZ_SEED:-}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent/fuzz
triple=$(rustc -vV | sed -n 's/^host: //p')

skip() {
    echo "SKIPPED: fuzzing: $1"
    [ -z "${FUZZ_REQUIRED:-}" ] || exit 1
    exit 0
}
command -v c++ >/dev/null || skip "libFuzzer needs a C++ compiler (package g++)"
# The shipped versions; cargo adds those of libFuzzer.
cp ../../Cargo.lock Cargo.lock
cargo fetch --quiet --target "$triple" || skip "cannot fetch its crates"

# One build directory per compiler version, so that only changed dependencies are rebuilt. --target
# keeps build scripts uninstrumented.
build=$cache/build-$(rustc -V | cut -d' ' -f2)
flags=(-Cpasses=sancov-module)
for flag in level=4 inline-8bit-counters pc-table trace-compares; do
    flags+=("-Cllvm-args=-sanitizer-coverage-$flag")
done
began=$SECONDS
RUSTFLAGS="${flags[*]}" cargo build --release --quiet --locked --bins --target "$triple" \
    --target-dir "$build"
echo "== fuzz targets built: $((SECONDS - began)) s"

# Additional seed inputs in the repository.
declare -A in_tree=(
    [certificate]=agent/tests/certificates
    [context]="one-context/tests/cases packaging/examples"
    [template]=packaging/opennebula
    [variables]="one-context/tests/cases packaging/examples"
)
fuzz() {
    local target=$1 status=0 found=$cache/corpus/$1 corpora directory
    [ -z "$seed" ] || found=$(mktemp -d)
    corpora=("$found")
    mkdir -p "$found" "artifacts/$1"
    for directory in "corpus/$target" ${2:-}; do
        [ ! -d "$directory" ] || corpora+=("$directory")
    done
    "$build/$triple/release/$target" "${corpora[@]}" ${seed:+-seed="$seed"} \
        -max_total_time="$seconds" -max_len=8192 \
        -timeout=10 -print_final_stats=1 -artifact_prefix="artifacts/$target/" \
        >"$cache/$target.log" 2>&1 || status=$?
    [ -z "$seed" ] || rm -rf "$found"
    if [ $status = 0 ]; then
        printf '   %-12s %10d executions in %d s\n' "$target" \
            "$(sed -n 's/^stat::number_of_executed_units: *//p' "$cache/$target.log")" "$seconds"
    else
        echo "   $target FAILED: $cache/$target.log ends with"
        tail -n 30 "$cache/$target.log"
        sed -n "s|.*Test unit written to |   reproduce: $build/$triple/release/$target $PWD/|p" \
            "$cache/$target.log"
        return 1
    fi
}
export -f fuzz
export seconds seed cache build triple
[ $# -gt 0 ] || mapfile -t < <(basename -s .rs targets/*.rs)
for target in "${@:-${MAPFILE[@]}}"; do
    directories=${in_tree[$target]:-}
    printf '%s\0%s\0' "$target" "${directories:+../../${directories// / ..\/..\/}}"
done | xargs -0 -n 2 -P "$(nproc)" bash -euo pipefail -c 'fuzz "$@"' fuzz
