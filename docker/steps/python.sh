#!/bin/bash
# python.sh FOLDER: /opt/train with torch ($TORCH), the wheels in FOLDER, and SageMaker's toolkit ($TOOLKIT; empty: none).
# SageMaker's launchers run scripts by `python -m mpi4py`; examples/smddp_digits.py learns from scikit-learn's data.
set -euo pipefail
[ -x /opt/train/bin/python ] || python3 -m venv /opt/train
pip=(/opt/train/bin/python -m pip install --no-cache-dir --disable-pip-version-check)
# shellcheck disable=SC2086 # several packages are several words
[ -z "${TORCH:-}" ] || "${pip[@]}" $TORCH
"${pip[@]}" numpy mpi4py scikit-learn
# The library looks for libfabric there.
[ ! -d /opt/libfabric ] || ln -sfn /opt/libfabric/lib/openmpi /opt/train/lib/openmpi
# These wheels, whatever is there.
"${pip[@]}" --no-deps --force-reinstall "$1"/*.whl
# shellcheck disable=SC2086
[ -z "${TOOLKIT:-}" ] || "${pip[@]}" $TOOLKIT
