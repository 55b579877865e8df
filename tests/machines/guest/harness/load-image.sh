#!/bin/bash
# Puts the image into Docker, under the name that the agent asks for by default.
set -eu
docker image inspect flower-supernode-pytorch:1.31.0 >/dev/null 2>&1 && exit
changes=()
while IFS= read -r change; do changes+=(--change "$change"); done </harness/image-changes
docker import "${changes[@]}" /harness/image.tar flower-supernode-pytorch:1.31.0
