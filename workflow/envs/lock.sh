#!/bin/sh
# lock.sh [cpu|v100|a100]...: resolves the lists *.in into complete, pinned *.txt; all by default.
# cpu (with dev, analysis and the conda environments) is for every Python that is supported. uv looks for the
# CPU build of torch where UV_FIND_LINKS or its own configuration says, else in PyTorch's CPU
# index. The lists for GPUs are for Linux on x86-64, resolved for Python 3.11; they hold on 3.12
# and 3.13, too. Nothing of what is resolved is installed.
set -eu
cd "$(dirname "$0")"
root=../../.venv/bin
"$root/pip" install --quiet uv
compile() { "$root/uv" pip compile --quiet --python-version 3.11 --no-header --no-annotate "$@"; }
unused="sys_platform == '(never|win32|darwin|emscripten)'"

resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT

lock_cpu() {
    compile --universal --overrides cpu-without.txt cpu.in > "$resolved" ||
        compile --universal --torch-backend cpu --overrides cpu-without.txt cpu.in > "$resolved"
    grep -vE "$unused" "$resolved" > cpu.txt
    compile --universal --constraints cpu.txt dev.in > "$resolved"
    grep -vE "$unused" "$resolved" | grep -vxFf cpu.txt > dev.txt

    as_conda cpu "pip needs a source of the CPU build of torch (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)."

    # Tables and figures come from the same versions, without the engines.
    compile --universal --constraints cpu.txt analysis.in > "$resolved"
    grep -vE "$unused" "$resolved" > analysis.txt
    as_conda analysis ""
}

# as_conda LIST NOTE: the same list as a conda environment, for `snakemake --sdm conda`.
as_conda() {
    {
        echo "# $1.txt as a conda environment, made by lock.sh. PYTHONPATH must name the folder workflow/."
        [ -z "$2" ] || echo "# $2"
        echo "channels: [conda-forge]"
        echo "dependencies:"
        echo "  - python >=3.11,<3.14"
        echo "  - pip"
        echo "  - pip:"
        sed 's/.*/      - "&"/' "$1.txt"
    } > "$1.yaml"
}

# pip takes 2.7.1+cpu for ==2.7.1 where its sources have that, but not for ===2.7.1.
lock_gpu() {
    compile --python-platform x86_64-manylinux_2_31 "$1.in" > "$resolved"
    sed 's/^\(torch\(\|audio\|codec\|vision\)\)==/\1===/' "$resolved" > "$1.txt"
}

[ $# -gt 0 ] || set -- cpu v100 a100
for list in "$@"; do
    case $list in
        cpu) lock_cpu ;;
        v100 | a100) lock_gpu "$list" ;;
        *) echo "lock.sh: no list $list; there are cpu, v100 and a100." >&2; exit 1 ;;
    esac
done
