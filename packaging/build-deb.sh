#!/usr/bin/env bash
# Builds the Debian package with cargo-deb from agent/Cargo.toml. The last line printed is its path.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
packaging/install-tools.sh deb >&2
cargo_deb=$(packaging/cargo-tool.sh cargo-deb 3.8.0)
"$cargo_deb" deb --quiet --locked --package supernode-agent \
    --output "${CARGO_TARGET_DIR:-target}/debian/" | tail -n 1
