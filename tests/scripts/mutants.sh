#!/usr/bin/env bash
# `make mutants`: applies every mutation of cargo-mutants to the pure modules (.cargo/mutants.toml),
# runs their tests on each, and prints for each module how many were detected, and the missed ones.
# All modules take hours, one file takes minutes:
#
#   mutants.sh [FILE…]      # agent/src/backoff.rs, or a pattern: 'agent/src/config/*.rs'
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
program=$(packaging/cargo-tool.sh cargo-mutants 27.1.0)
# Build outside the mutated copy, so that dependencies are built once, and without debug
# information, which is not used here.
export CARGO_TARGET_DIR=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent/mutants-build
export CARGO_PROFILE_DEV_DEBUG=none
# Do not shrink failing cases and do not save them for the next mutant.
export PROPTEST_MAX_SHRINK_ITERS=0 PROPTEST_DISABLE_FAILURE_PERSISTENCE=1
out=target/mutants.out
config=.cargo/mutants.toml
if [ $# -gt 0 ]; then
    # --file adds to the configured files, so drop those. (--re cannot replace them: it does not
    # apply to every kind of mutation.)
    mkdir -p target
    sed '/^examine_globs = \[$/,/^\]$/d' "$config" >target/mutants.toml
    config=target/mutants.toml
fi
status=0
"$program" mutants --jobs 1 --output target --config "$config" "${@/#/--file=}" || status=$?
# 2 and 3: some mutants were missed or timed out (an endless loop, for example). Both are counted
# below.
case $status in 0 | 2 | 3) ;; *) exit "$status" ;; esac
awk -F: '
    FILENAME ~ /caught|timeout/ { detected[$1]++ }
    { all[$1]++ }
    END {
        for (file in all) {
            share = 100 * detected[file] / all[file]
            printf "   %3d of %3d (%5.1f %%) %s\n", detected[file], all[file], share, file
            sum += all[file]; sum_detected += detected[file]
        }
        share = sum ? 100 * sum_detected / sum : 100
        printf "   %3d of %3d (%5.1f %%) total\n", sum_detected, sum, share
    }' $out/caught.txt $out/timeout.txt $out/missed.txt | sort -t')' -k2
[ ! -s $out/missed.txt ] || sed 's/^/   missed: /' $out/missed.txt
