#!/bin/bash
# Unpack the Slurm of another Debian suite into a folder, to run from there beside this machine's own. As root, on Debian.
#   root.sh SUITE FOLDER      bookworm is Slurm 22.05, trixie 24.11, sid 26.05
# With LABCTL_TEST_SLURM_ROOT=FOLDER the test clusters and labctl call the programs in FOLDER/programs. munged and MariaDB stay this
# machine's. `make test-slurm-versions` runs the tests of this folder on each.
set -eu
suite=${1:?suite of Debian} root=$(realpath -m "${2:?folder}")
missing=
for tool in mmdebstrap patchelf; do command -v $tool >/dev/null || missing="$missing $tool"; done
if [ -n "$missing" ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
rm -rf "$root"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -1)
# No script of a package runs. A mirror's copy of sid may be some weeks old, so its date is not checked.
mmdebstrap --quiet --variant=extract --aptopt='Acquire::Check-Valid-Until "false"' \
  --include=slurmctld,slurmd,slurm-client,slurmdbd,slurm-wlm-basic-plugins,slurm-wlm-mysql-plugin "$suite" "$root" "deb $mirror $suite main"
# The programs get the loader and the libraries of their own suite.
libraries=$(echo "$root"/usr/lib/*-linux-gnu)
rpath=$libraries:$libraries/slurm-wlm:$root/lib/${libraries##*/} # before trixie some are in /lib
loader=$(ls "$root"/usr/lib*/ld-linux-*.so.* "$root"/lib*/ld-linux-*.so.* 2>/dev/null | head -1)
mkdir "$root/programs"
for program in sacct sacctmgr sbatch scancel scontrol sinfo squeue srun slurmctld slurmd slurmdbd slurmstepd; do
  for file in "$root"/usr/bin/$program "$root"/usr/sbin/$program "$root"/usr/sbin/$program-wlm; do
    [ -f "$file" ] && [ ! -L "$file" ] || continue
    patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$rpath" "$file"
    ln -sf "$file" "$root/programs/$program"
  done
done
"$root/programs/slurmctld" -V
