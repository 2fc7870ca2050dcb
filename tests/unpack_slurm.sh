#!/bin/bash
# unpack_slurm.sh SUITE FOLDER: unpacks the Slurm of another Debian suite beside this system, for the
# tests: no chroot, no mount, no installation. The tests use it with UNPACKED_SLURM=FOLDER.
# Needs a Debian system on x86-64 and patchelf. Does nothing if FOLDER is complete.
set -eu
suite=$1 root=$2
if [ -e "$root/complete" ]; then exit 0; fi
apt=$root/apt
mkdir -p "$root/wrap" "$root/named" "$apt"/{state/lists/partial,cache/archives/partial,dpkg} \
    "$apt"/etc/{sources.list.d,apt.conf.d,preferences.d}
touch "$apt/dpkg/status"
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -n 1)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] $mirror $suite main" > "$apt/etc/sources.list"
cat > "$apt/apt.conf" <<END
Dir::State "$apt/state"; Dir::State::status "$apt/dpkg/status"; Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/etc/sources.list"; Dir::Etc::sourceparts "$apt/etc/sources.list.d";
Dir::Etc::preferencesparts "$apt/etc/preferences.d";
END
export APT_CONFIG=$apt/apt.conf
packages="slurmctld slurmd slurm-client slurmdbd munge"
apt-get -qq update
# shellcheck disable=SC2086  # a list of names
apt-get -qq install -y --no-install-recommends --download-only $packages >/dev/null
for deb in "$apt"/cache/archives/*.deb; do
    case ${deb##*/} in  # what Slurm does not load
        perl*|libperl*|util-linux*|systemd*|dpkg*|apt_*|coreutils*|bash_*|login*|passwd*) continue ;;
        debconf*|base-*|tzdata*|init*|*-doc_*|*-common_*) continue ;;
    esac
    dpkg-deb --fsys-tarfile "$deb" |
        tar -x -C "$root" --exclude='./usr/share/*' --keep-directory-symlink
done
lib=$root/usr/lib/x86_64-linux-gnu
loader=$(find "$lib/ld-linux-x86-64.so.2" "$root/usr/lib64/ld-linux-x86-64.so.2" 2>/dev/null | head -n 1)
for program in slurmctld slurmd slurmdbd slurmstepd munged \
    sbatch srun squeue scancel scontrol sinfo sacct sacctmgr; do
    file=$(find "$root/usr/sbin/$program-wlm" "$root/usr/sbin/$program" "$root/usr/bin/$program" \
        2>/dev/null | head -n 1)
    patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$lib:$lib/slurm-wlm" "$file"
    # The daemons start themselves again, so they must have their own names.
    ln -sfn "$file" "$root/named/$program"
    if [ "$program" = slurmd ]; then
        printf '#!/bin/sh\nexec %s -d %s "$@"\n' "$root/named/slurmd" "$root/named/slurmstepd" \
            > "$root/wrap/slurmd"
        chmod +x "$root/wrap/slurmd"
    else
        ln -sfn "$file" "$root/wrap/$program"
    fi
done
rm -r "$apt/cache"
touch "$root/complete"
