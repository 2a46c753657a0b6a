#!/bin/bash
# check.sh PROGRAM: what must work in the image, GPU or not: sshd's settings, the launcher, and two ranks of PROGRAM.
set -euo pipefail
export PATH=/opt/train/bin:$PATH
/usr/sbin/sshd -t
smddprun -np 2 --dry-run "$1"
OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 smddprun -np 2 --mpi-options --oversubscribe --bind none "$1"
