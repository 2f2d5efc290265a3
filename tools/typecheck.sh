#!/usr/bin/env bash
# Type-check the package: tools/typecheck.sh [mypy options]
#
# mypy does not see through an editable install, and in the repository `sparsecc.passes` is the folder
# `passes`. So check a temporary folder of links that is laid out as the installed package.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

mkdir "$tree/sparsecc"
ln -s "$root"/sparsecc/* "$root"/{passes,codegen,runtime} "$tree/sparsecc/"

cd "$tree"
# Show the repository's paths, so that an error can be clicked.
"$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" \
  "$@" -p sparsecc | sed -E 's#^sparsecc/(passes|codegen|runtime)/#\1/#'
