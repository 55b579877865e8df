#!/usr/bin/env bash
# Installs the missing packages for a task (demo, tests, lint, …) and prints what it installs.
#
#   install-tools.sh demo|test|lint|deb|image|test-image|test-images|fuzz|mutants|bench
set -euo pipefail

# Program to package name (Debian and Ubuntu).
declare -A packages=(
    [dockerd]=docker.io [docker]=docker.io [ip]=iproute2 [nsenter]=util-linux [iptables]=iptables
    [mmdebstrap]=mmdebstrap [python3]=python3 [busybox]=busybox-static [shellcheck]=shellcheck
    [cc]=gcc [setpriv]=util-linux [apparmor_parser]=apparmor [dpkg-deb]=dpkg [lintian]=lintian
    [systemd-nspawn]=systemd-container [qemu-system-x86_64]=qemu-system-x86 [xorriso]=xorriso
    [ruby]=ruby [mke2fs]=e2fsprogs [sfdisk]=fdisk [mkfs.vfat]=dosfstools [mmd]=mtools
    [qemu-img]=qemu-utils [openssl]=openssl [c++]=g++ [faketime]=faketime
    [strace]=strace [curl]=curl [jq]=jq
)
case "${1:-}" in
demo) wanted=(cc dockerd docker ip nsenter iptables mmdebstrap) ;;
test) wanted=(cc dpkg-deb dockerd docker ip nsenter setpriv iptables busybox python3 mmdebstrap
    systemd-nspawn lintian qemu-system-x86_64 xorriso mke2fs openssl ruby faketime) ;;
lint) wanted=(cc shellcheck) ;;
deb) wanted=(cc dpkg-deb) ;;
image) wanted=(cc dpkg-deb mmdebstrap ip nsenter mke2fs sfdisk mkfs.vfat mmd qemu-img) ;;
test-image) wanted=(qemu-system-x86_64 xorriso) ;;
test-images) wanted=(dockerd docker ip mmdebstrap) ;;
fuzz) wanted=(cc c++) ;;
mutants) wanted=(cc) ;;
bench) wanted=(cc dpkg-deb dockerd docker ip nsenter setpriv iptables busybox strace curl jq) ;;
*)
    sed -n 's/^#   /usage: /p' "$0" >&2
    exit 2
    ;;
esac
# With AppArmor enabled in the kernel Docker needs the parser, which docker.io only recommends.
if [[ $1 != @(lint|fuzz|mutants) ]] &&
    [ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ]; then
    wanted+=(apparmor_parser)
fi

missing=()
for tool in "${wanted[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("${packages[$tool]}")
done
# Firmware has no program to look for.
[ "$1" != test-image ] || [ -e /usr/share/OVMF/OVMF_CODE_4M.fd ] || missing+=(ovmf)
# Debian splits ensurepip out of Python.
[ "$1" != test ] || python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
[ ${#missing[@]} -gt 0 ] || exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

echo "installing: ${missing[*]} (apt-get install)"
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -qq --no-install-recommends -y "${missing[@]}" >/dev/null
