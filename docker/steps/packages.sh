#!/bin/bash
# System packages of the image.
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends \
  ca-certificates curl libnuma1 openssh-client openssh-server python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
