#!/usr/bin/env bash
# Makes a virtual environment and installs into it, torch first.
#   scripts/setup.sh FOLDER REQUIREMENT...      e.g. scripts/setup.sh .venv -e '.[dev]'
#
# PYTHON          the interpreter to start from (python3; 3.10 or newer)
# TORCH_INSTALL   what to ask pip for as torch, before all else. Without a GPU it is torch==2.13.0, the release that is
#                 tested most; with a GPU nothing, so that pyproject.toml's range brings the newest release for CUDA.
#                 On Linux, pip's default index has the CUDA build alone, which runs without a GPU too but takes
#                 several GB. To get the small one, name PyTorch's own index of CPU builds in pip's variable
#                 PIP_EXTRA_INDEX_URL (its address is on PyTorch's page "Start locally").
# PIP_*           all of pip's own variables work as ever.
set -euo pipefail

folder=$1
shift
python=${PYTHON:-python3}

fail() { echo "setup: $1" >&2; exit 1; }
command -v "$python" >/dev/null || fail "$python is not installed; Python 3.10 or newer is needed (set PYTHON to its path)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old; Python 3.10 or newer is needed (set PYTHON to its path)"

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; }
if has_gpu; then torch=${TORCH_INSTALL-}; else torch=${TORCH_INSTALL-torch==2.13.0}; fi

echo "setup: making $folder (a minute or two) with $("$python" --version), ${torch:-torch as pyproject.toml says}, $*"
"$python" -m venv "$folder"
install() { "$folder/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
if [ -n "$torch" ]; then install "$torch"; fi
install "$@"
