#!/usr/bin/env bash
# Builds the Debian package with cargo-deb from agent/Cargo.toml. The last line printed is its path.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
packaging/install-tools.sh deb >&2
cargo_deb=$(packaging/cargo-tool.sh cargo-deb 3.8.0)
target=${CARGO_TARGET_DIR:-target}

# The binary prints the completions, so it must be built for this machine.
unset CARGO_BUILD_TARGET
cargo build --quiet --release --locked -p supernode-agent >&2
# cargo-deb takes target/release in agent/Cargo.toml for this directory.
completions=$target/release/completions
install -d "$completions"
"$target/release/supernode-agent" completions bash >"$completions/supernode-agent.bash"
"$target/release/supernode-agent" completions fish >"$completions/supernode-agent.fish"
"$target/release/supernode-agent" completions zsh >"$completions/_supernode-agent"

"$cargo_deb" deb --quiet --no-build --locked --package supernode-agent \
    --output "$target/debian/" | tail -n 1
