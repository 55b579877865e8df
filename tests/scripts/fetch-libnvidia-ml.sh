#!/bin/sh
# Unpacks NVIDIA's own libnvidia-ml.so.1 (Debian package libnvidia-ml1, component non-free) into
# DIRECTORY and prints the library's path. Installs nothing: apt uses separate lists and a separate
# cache below DIRECTORY. A second run reuses the result.
set -eu

directory=${1:?usage: fetch-libnvidia-ml.sh DIRECTORY}
if [ ! -d "$directory/root" ]; then
    mkdir -p "$directory/lists/partial" "$directory/archives/partial"
    cd "$directory"
    # This machine's own Debian mirror, with the component non-free, which may not be enabled.
    source=$(awk '/^URIs:/ { print $2; exit } /^deb / { print $2; exit }' \
        /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list \
        2>/dev/null)
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    echo "deb $source $release non-free" >non-free.list
    own() {
        apt-get -o Dir::Etc::sourcelist="$directory/non-free.list" -o Dir::Etc::sourceparts=- \
            -o Dir::State::lists="$directory/lists" -o Dir::Cache="$directory" "$@" >&2
    }
    own update
    own download libnvidia-ml1
    dpkg -x libnvidia-ml1_*.deb unpacked
    mv unpacked root
fi
find "$directory/root" -name libnvidia-ml.so.1 -print -quit
