#!/bin/bash
# libfabric with EFA, Open MPI and aws-ofi-nccl by AWS's installer of version $EFA; EFA=none: Debian's Open MPI and libfabric.
# The kernel's part and limits are the host's. The installer verifies what it installs by AWS's key.
set -euo pipefail
apt-get update
if [ "${EFA:?a version, or none}" = none ]; then
  apt-get install -y --no-install-recommends openmpi-bin libfabric1
else
  folder=$(mktemp -d)
  curl -fsSL --retry 3 "https://efa-installer.amazonaws.com/aws-efa-installer-$EFA.tar.gz" | tar -xz -C "$folder"
  (cd "$folder/aws-efa-installer" && ./efa_installer.sh -y --mpi=openmpi4 --skip-kmod --skip-limit-conf)
  rm -rf "$folder"
fi
rm -rf /var/lib/apt/lists/*
