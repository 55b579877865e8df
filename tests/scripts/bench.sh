#!/usr/bin/env bash
# `make bench`: what the agent costs, as it is shipped, beside what a user would pick instead (tests/bench/README.md).
#
#   bench.sh [--short]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
package=$(packaging/build-deb.sh)
# The one in the package: what is built next for all together has the features of everybody's crates.
target=$(realpath "${CARGO_TARGET_DIR:-target}")
cp "$target/release/supernode-agent" "$target/bench-agent"
cargo build --release --locked --quiet -p supernode-bench -p supernode-tests -p nvml-simulator
# What it starts is in its group, and ends with it, whatever happens.
set -m
SUPERNODE_AGENT=$target/bench-agent "$target/release/supernode-bench" --package "$package" "$@" &
trap 'kill -KILL -- -$! 2>/dev/null || true' EXIT
wait $!
