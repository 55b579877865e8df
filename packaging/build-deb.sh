#!/usr/bin/env bash
# `make deb`: the Debian package, by cargo-deb from agent/Cargo.toml. Prints its path, as the last line.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
packaging/install-tools.sh deb >&2
cargo_deb=$(packaging/cargo-tool.sh cargo-deb 3.8.0)
"$cargo_deb" deb --quiet --locked --package supernode-agent --output "${CARGO_TARGET_DIR:-target}/debian/" | tail -n 1
