#!/usr/bin/env bash
# Builds a framework image with the name that the agent uses: flower-supernode-FRAMEWORK:VERSION, or
# flwr/supernode:VERSION for base. The file `versions` pins the contents.
#
#   build.sh base|sklearn|pytorch|tensorflow [cpu|cuda] [docker build's options]
#
# pytorch and tensorflow include CUDA unless cpu is given; the name is the same. From the
# environment:
#   IMAGE                 another name
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_TRUSTED_HOST, http_proxy, https_proxy, no_proxy
#                         for pip; `pytorch cpu` needs an index with PyTorch's +cpu builds
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=/dev/null
. "$here/versions"
usage() {
    echo "usage: build.sh base|sklearn|pytorch|tensorflow [cpu|cuda] [docker build's options]" >&2
    exit 2
}
framework=${1:-}
shift || usage
variant=
case ${1:-} in cpu | cuda)
    variant=$1
    shift
    ;;
esac
case $framework-$variant in
base- | base-cpu) requirements='' ;;
sklearn- | sklearn-cpu) requirements="scikit-learn==$SKLEARN" ;;
pytorch- | pytorch-cuda) requirements="torch==$TORCH torchvision==$TORCHVISION" ;;
pytorch-cpu) requirements="torch==$TORCH+cpu torchvision==$TORCHVISION+cpu" ;;
tensorflow- | tensorflow-cuda) requirements="tensorflow[and-cuda]==$TENSORFLOW" ;;
tensorflow-cpu) requirements="tensorflow-cpu==$TENSORFLOW" ;;
*) usage ;;
esac
name=flower-supernode-$framework
[ "$framework" != base ] || name=flwr/supernode

arguments=(--build-arg "BASE=$BASE" --build-arg "FLOWER=$FLOWER" --build-arg "FRAMEWORK=$framework"
    --build-arg "REQUIREMENTS=$requirements")
for variable in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST \
    http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
    # Without the value, which may contain a password: docker reads it from the environment.
    [ -z "${!variable:-}" ] || arguments+=(--build-arg "$variable")
done
exec docker build "${arguments[@]}" --tag "${IMAGE:-$name:$FLOWER}" "$@" - <"$here/Dockerfile"
