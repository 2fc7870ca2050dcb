#!/bin/sh
# Resolves cpu.in and dev.in into the complete, pinned cpu.txt and dev.txt, for every Python
# that is supported. uv looks for the CPU build of torch where UV_FIND_LINKS or its own
# configuration says, else in PyTorch's CPU index.
set -eu
cd "$(dirname "$0")"
root=../../.venv/bin
"$root/pip" install --quiet uv
compile() { "$root/uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate "$@"; }
unused="sys_platform == '(never|win32|darwin|emscripten)'"

resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
compile --overrides cpu-without.txt cpu.in > "$resolved" ||
    compile --torch-backend cpu --overrides cpu-without.txt cpu.in > "$resolved"
grep -vE "$unused" "$resolved" > cpu.txt
compile --constraints cpu.txt dev.in > "$resolved"
grep -vE "$unused" "$resolved" | grep -vxFf cpu.txt > dev.txt

# The same list as a conda environment, for `snakemake --sdm conda`.
{
    echo "# cpu.txt as a conda environment, by lock.sh. pip needs a source of the CPU build of torch"
    echo "# (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), and PYTHONPATH the folder workflow/."
    echo "channels: [conda-forge]"
    echo "dependencies:"
    echo "  - python >=3.11,<3.14"
    echo "  - pip"
    echo "  - pip:"
    sed 's/.*/      - "&"/' cpu.txt
} > cpu.yaml
