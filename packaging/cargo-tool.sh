#!/usr/bin/env bash
# Prints the path of a cargo subcommand; builds it first, outside the tree, where this machine has none (minutes, once).
#
#   cargo-tool.sh cargo-deny 0.20.2
set -euo pipefail

name=${1:?usage: cargo-tool.sh NAME VERSION}
release=${2:?usage: cargo-tool.sh NAME VERSION}
folder=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent/$name-$release
program=$(command -v "$name" || echo "$folder/bin/$name")
if [ ! -x "$program" ]; then
    echo "building $name $release in $folder" >&2
    cargo install --quiet --locked --root "$folder" "$name@$release" >&2
fi
echo "$program"
