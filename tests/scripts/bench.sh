#!/usr/bin/env bash
# `make bench`: measures the resource usage of the packaged agent next to alternatives
# (tests/bench/README.md).
#
#   bench.sh [--short]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
package=$(packaging/build-deb.sh)
# Use the packaged binary: the next build unifies the features of all workspace crates.
target=$(realpath "${CARGO_TARGET_DIR:-target}")
cp "$target/release/supernode-agent" "$target/bench-agent"
cargo build --release --locked --quiet -p supernode-bench -p supernode-tests -p nvml-simulator
# Run the benchmark in its own process group, so that all its children are killed with it.
set -m
SUPERNODE_AGENT=$target/bench-agent "$target/release/supernode-bench" --package "$package" "$@" &
trap 'kill -KILL -- -$! 2>/dev/null || true' EXIT
wait $!
