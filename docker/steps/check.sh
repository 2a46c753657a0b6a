#!/bin/bash
# check.sh PROGRAM: what must work in the image, GPU or not: sshd's settings, the launcher, the examples' and the toolkit's
# packages, and two ranks of PROGRAM, on one node and on two (which need libfabric).
set -euo pipefail
export PATH=/opt/train/bin:$PATH
/usr/sbin/sshd -t
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun -n 1 python -m mpi4py -c "import sklearn"
smddprun -np 2 --dry-run "$1"
smddprun -np 2 --mpi-options --oversubscribe --bind none "$1"
rank=(--bind-to none -n 1 -x)
mpirun --oversubscribe "${rank[@]}" SMDDP_NODE_ID=a python "$1" : "${rank[@]}" SMDDP_NODE_ID=b python "$1"
