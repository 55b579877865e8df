#!/bin/sh
# Unpacks NVIDIA's own libnvidia-ml.so.1 (Debian package libnvidia-ml1, component non-free) into FOLDER and prints the
# library's path. Nothing is installed: apt works with lists and a cache of its own below FOLDER. Done once per FOLDER.
set -eu

folder=${1:?usage: fetch-libnvidia-ml.sh FOLDER}
if [ ! -d "$folder/root" ]; then
    mkdir -p "$folder/lists/partial" "$folder/archives/partial"
    cd "$folder"
    # The machine's own source of Debian packages, with the component that it may not have switched on.
    source=$(awk '/^URIs:/ { print $2; exit } /^deb / { print $2; exit }' \
        /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null)
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    echo "deb $source $release non-free" >non-free.list
    own() {
        apt-get -o Dir::Etc::sourcelist="$folder/non-free.list" -o Dir::Etc::sourceparts=- \
            -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder" "$@" >&2
    }
    own update
    own download libnvidia-ml1
    dpkg -x libnvidia-ml1_*.deb unpacked
    mv unpacked root
fi
find "$folder/root" -name libnvidia-ml.so.1 -print -quit
