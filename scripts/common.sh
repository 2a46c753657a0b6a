# shellcheck shell=bash
# What the scripts share. Sourced, not run; leaves the caller in the project's root.

set -euo pipefail
# Ctrl-C ends the script, also where the program it waits for takes it for an ordinary end.
trap 'exit 130' INT

# With it, cd may print and go elsewhere.
unset CDPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
export ROOT VENV
cd "$ROOT"

# Open MPI refuses to run as root unless told twice: the first pair is for 4.x, the second for 5.x.
if [ "$(id -u)" = 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
warn() { printf '\033[1;33mnote:\033[0m %s\n' "$*" >&2; }
die() {
  printf '\033[1;31merror:\033[0m %s\n' "$*" >&2
  exit 1
}
# No colours in files.
if [ ! -t 1 ]; then
  say() { printf '==> %s\n' "$*"; }
  warn() { printf 'note: %s\n' "$*" >&2; }
fi

has() { command -v "$1" >/dev/null 2>&1; }

# A free TCP port on this machine.
free_port() {
  "${VENV}/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# What the other scripts begin with. NO_SETUP=1 takes things as they are.
set_up() { [ -n "${NO_SETUP:-}" ] || ./scripts/setup; }
