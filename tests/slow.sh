#!/bin/sh
# The batteries that the default run leaves out: matrices of more than 2**31 elements (about 8 GB of memory), and the
# tensor types of some hundred model shapes against llama.cpp.
#
#   tests/slow.sh [PYTEST ARGUMENTS...]
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m pytest -m slow "$@"
