#!/usr/bin/env bash
# Runs the quick tests with other releases of torch, each in an environment of its own, which is made where it is missing.
#   scripts/test_versions.sh [TORCH[@PYTHON]...]      e.g. scripts/test_versions.sh 2.8.0@python3.10 2.12.1
# Without arguments: the oldest torch, with the oldest release of each dependency (scripts/oldest.txt), and the newest torch.
#
# VERSIONS   the folder of the environments (.versions). Each takes 7 to 8 GB: pip's default index has torch for CUDA.
# ARGS       is passed on to pytest.
# PIP_*      all of pip's own variables work as ever.
set -euo pipefail
cd "$(dirname "$0")/.."

oldest=2.8.0@python3.10
newest=2.14.1@python3.13
folder=${VERSIONS:-.versions}
[ $# -gt 0 ] || set -- "$oldest" "$newest"

failed=()
for wanted in "$@"; do
  torch=${wanted%%@*}
  python=${wanted#"$torch"}
  python=${python#@}
  [ -n "$python" ] && "$python" -c pass 2>/dev/null || python=python3 # torch is what is asked for; any Python will do
  environment=$folder/torch-$torch
  if [ ! -e "$environment/.ready" ]; then
    rm -rf "$environment"
    mkdir -p "$folder"
    if [ "$wanted" = "$oldest" ]; then constraints=scripts/oldest.txt; else constraints=${PIP_CONSTRAINT:-}; fi
    PIP_CONSTRAINT=$constraints PYTHON=$python TORCH_INSTALL=torch==$torch scripts/setup.sh "$environment" -e '.[dev]'
    touch "$environment/.ready"
  fi
  echo "versions: torch $torch, $("$environment/bin/python" --version)"
  # shellcheck disable=SC2086 # ARGS are several words
  PATH=$(cd "$environment/bin" && pwd):$PATH "$environment/bin/python" -m pytest -n 2 --dist worksteal tests \
    -m "not distributed and not processes and not slow" ${ARGS:-} || failed+=("$torch")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "versions: the quick tests failed with torch ${failed[*]}" >&2
  exit 1
fi
