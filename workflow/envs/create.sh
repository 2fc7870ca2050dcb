#!/bin/sh
# create.sh FOLDER LIST...: a virtual environment with exactly the packages of the lists.
# The lists are complete, so nothing is resolved and nothing that they leave out comes in.
set -eu
folder=$1
shift

say() { echo "create.sh: $*" >&2; }

for python in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        break
    fi
    python=
done
[ -n "$python" ] || { say "no Python 3.11 or newer found. Install one (apt install python3)."; exit 1; }

# What a bare Debian or Ubuntu lacks: ensurepip for the environment, and libraries that vLLM
# (libnuma) and llama.cpp (libgomp) link to.
libraries=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)
packages=
"$python" -c 'import ensurepip' 2>/dev/null || packages="$packages python3-venv"
for library in numa gomp; do
    case $libraries in *"lib$library.so.1 "*) ;; *) packages="$packages lib${library}1" ;; esac
done
if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi
    # shellcheck disable=SC2086  # both are lists of words
    if ! { $as_root apt-get -qq update && $as_root apt-get -qq install -y --no-install-recommends $packages; }; then
        say "system packages are missing. Type: sudo apt install$packages"
        exit 1
    fi
fi

rm -rf "$folder"
"$python" -m venv "$folder"
pip="$folder/bin/pip --disable-pip-version-check"
# pip compiles one module after another; compileall uses all cores.
install="$pip install --quiet --no-compile"
# The CPU build of torch is not among the public packages: pip's own sources first, then the
# index that PyTorch keeps for it, which uv knows by name. The plain torch would be CUDA, and
# that is what the lists for GPUs name.
torch=$(sed -n 's/^torch==\([^ ;]*+cpu\).*/\1/p' "$1")
if [ -n "$torch" ] && ! $install --no-deps "torch==$torch" 2>/dev/null; then
    say "torch $torch is not in pip's sources; asking PyTorch's CPU index"
    $install uv
    "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --no-deps \
        --torch-backend cpu "torch==$torch"
fi
for list in "$@"; do
    say "installing $(grep -c '==' "$list") packages of $list"
    $install --no-deps -r "$list"
done
# Some packages have files that are not for this version of Python; they are left as they are.
"$folder/bin/python" -W ignore -m compileall -qq -j 0 "$folder/lib" || true
