#!/bin/sh
# Slurm, a C compiler for the fake NVML and a browser for the page, from Debian's or Ubuntu's packages,
# for the tests alone: nothing of it is started, and a machine that has them, or may not install them,
# is left as it is.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
slurm="slurmctld slurmd slurm-client munge slurmdbd mariadb-server"
if command -v slurmctld >/dev/null && command -v mariadbd >/dev/null; then slurm=; fi
compiler="gcc libc6-dev"
if command -v cc >/dev/null; then compiler=; fi
browser="chromium fonts-dejavu-core"
if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then browser=; fi
if [ -z "$slurm$compiler$browser" ]; then exit 0; fi
left_out="What is not installed is left out of the tests: $slurm $compiler $browser"
if [ "$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi
if ! $as_root true 2>/dev/null || ! command -v apt-get >/dev/null; then
    echo "$left_out (no root, or no apt)." >&2
    exit 0
fi
# Packages of servers start them, unless this says no.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee $policy >/dev/null
    $as_root chmod +x $policy
    trap '$as_root rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get -qq update
# shellcheck disable=SC2086  # lists of names
for wanted in "$slurm $compiler" "$browser"; do
    $as_root apt-get -qq install -y --no-install-recommends $wanted >/dev/null ||
        echo "What is not installed is left out of the tests: $wanted (apt could not)." >&2
done
