#!/bin/sh
# Installs what the tests need from Debian's or Ubuntu's packages: Slurm, a C compiler, libfuse and a
# browser. It starts none of them. Without root or apt it changes nothing and says what is missing.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
slurm="slurmctld slurmd slurm-client munge slurmdbd mariadb-server"
if command -v slurmctld >/dev/null && command -v mariadbd >/dev/null; then slurm=; fi
tools="gcc libc6-dev libfuse3-3"
if command -v cc >/dev/null && ldconfig -p | grep -q libfuse3; then tools=; fi
browser="chromium fonts-dejavu-core"
if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then browser=; fi
if [ -z "$slurm$tools$browser" ]; then exit 0; fi
missing="The tests that need these packages are left out: $slurm $tools $browser"
if [ "$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi
if ! $as_root true 2>/dev/null || ! command -v apt-get >/dev/null; then
    echo "$missing (no root, or no apt)." >&2
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
for wanted in "$slurm $tools" "$browser"; do
    $as_root apt-get -qq install -y --no-install-recommends $wanted >/dev/null ||
        echo "The tests that need these packages are left out: $wanted (apt failed)." >&2
done
