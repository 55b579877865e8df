#!/bin/bash
# Loads the test image into Docker under the agent's default image name.
set -eu
docker image inspect flower-supernode-pytorch:1.31.0 >/dev/null 2>&1 && exit
changes=()
while IFS= read -r change; do changes+=(--change "$change"); done </harness/image-changes
docker import "${changes[@]}" /harness/image.tar flower-supernode-pytorch:1.31.0
