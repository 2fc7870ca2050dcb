#!/bin/sh
# Slurm from Debian's or Ubuntu's packages, for the tests alone: nothing of it is started, and a
# machine that has it, or may not install it, is left as it is.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
if command -v slurmctld >/dev/null && command -v mariadbd >/dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi
if ! $as_root true 2>/dev/null || ! command -v apt-get >/dev/null; then
    echo "tests/slurm is left out: Slurm is not installed and cannot be (no root, or no apt)." >&2
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
$as_root apt-get -qq install -y --no-install-recommends \
    slurmctld slurmd slurm-client munge slurmdbd mariadb-server >/dev/null ||
    echo "tests/slurm is left out: apt could not install Slurm." >&2
