#!/usr/bin/env bash
# `make mutants`: changes the pure modules (.cargo/mutants.toml) in every way that cargo-mutants knows, runs their tests on each
# change, and prints for each module how many were noticed, and which were not. All of them take hours, one file minutes:
#
#   mutants.sh [FILE…]      # agent/src/backoff.rs, or a pattern of several: 'agent/src/config/*.rs'
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
program=$(packaging/cargo-tool.sh cargo-mutants 27.1.0)
# Built outside of the copy in which the code is changed, so that the dependencies are built once; without debug information,
# which nobody reads.
export CARGO_TARGET_DIR=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent/mutants-build CARGO_PROFILE_DEV_DEBUG=none
# A story that fails is not made shorter, and not told again to the next change.
export PROPTEST_MAX_SHRINK_ITERS=0 PROPTEST_DISABLE_FAILURE_PERSISTENCE=1
out=target/mutants.out
config=.cargo/mutants.toml
if [ $# -gt 0 ]; then
    # --file adds to the configured files, and --re does not hold back every kind of change.
    mkdir -p target
    sed '/^examine_globs = \[$/,/^\]$/d' "$config" >target/mutants.toml
    config=target/mutants.toml
fi
status=0
"$program" mutants --jobs 1 --output target --config "$config" "${@/#/--file=}" || status=$?
# 2 and 3: some were not noticed, or ran into the time limit, as one that loops for ever does. They are counted here.
case $status in 0 | 2 | 3) ;; *) exit "$status" ;; esac
awk -F: '
    FILENAME ~ /caught|timeout/ { noticed[$1]++ }
    { all[$1]++ }
    END {
        for (file in all) {
            printf "   %3d of %3d (%5.1f %%) %s\n", noticed[file], all[file], 100 * noticed[file] / all[file], file
            sum += all[file]; sum_noticed += noticed[file]
        }
        printf "   %3d of %3d (%5.1f %%) together\n", sum_noticed, sum, sum ? 100 * sum_noticed / sum : 100
    }' $out/caught.txt $out/timeout.txt $out/missed.txt | sort -t')' -k2
[ ! -s $out/missed.txt ] || sed 's/^/   not noticed: /' $out/missed.txt
