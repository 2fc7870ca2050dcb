#!/bin/sh
# lock.sh [aiperf|guidellm]...: resolves the lists *.in into complete, pinned *.txt; both by
# default. They are for Linux and every Python that servegrid supports; see workflow/envs/lock.sh.
set -eu
cd "$(dirname "$0")"
root=../../.venv/bin
without=../../workflow/envs/cpu-without.txt
unused="sys_platform == '(never|win32|darwin|emscripten)'|platform_system == 'Windows'"
"$root/pip" install --quiet uv
compile() {
    "$root/uv" pip compile --quiet --python-version 3.11 --no-header --no-annotate --universal \
        --overrides "$without" "$@"
}

resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
[ $# -gt 0 ] || set -- aiperf guidellm
for list in "$@"; do
    compile "$list.in" > "$resolved" || compile --torch-backend cpu "$list.in" > "$resolved"
    grep -vE "$unused" "$resolved" > "$list.txt"
done
