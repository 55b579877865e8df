#!/usr/bin/env bash
# Prints the path of a cargo subcommand. If it is not installed, builds it once in the cache outside
# the tree, which takes minutes.
#
#   cargo-tool.sh cargo-deny 0.20.2
set -euo pipefail

name=${1:?usage: cargo-tool.sh NAME VERSION}
release=${2:?usage: cargo-tool.sh NAME VERSION}
directory=${XDG_CACHE_HOME:-$HOME/.cache}/supernode-agent/$name-$release
program=$(command -v "$name" || echo "$directory/bin/$name")
if [ ! -x "$program" ]; then
    echo "building $name $release in $directory" >&2
    cargo install --quiet --locked --root "$directory" "$name@$release" >&2
fi
echo "$program"
