#!/bin/bash
# Another real Slurm beside this machine's: its packages unpacked under a folder, to run from there. On Debian; see test_versions in the Makefile.
#   root.sh SUITE FOLDER      24.11 is trixie, 26.05 sid
# With LABCTL_TEST_SLURM_ROOT=FOLDER the test cluster and labctl call the programs of FOLDER/bin. munged and MariaDB stay this machine's.
set -eu
suite=${1:?suite of Debian} root=$(realpath -m "${2:?folder}")
missing=
for tool in mmdebstrap patchelf; do command -v $tool >/dev/null || missing="$missing $tool"; done
[ -z "$missing" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null; }
rm -rf "$root"
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -1)
# Only unpacked: no script of a package runs. A mirror's copy of sid may be some weeks old, so its date is not checked.
mmdebstrap --quiet --variant=extract --aptopt='Acquire::Check-Valid-Until "false"' \
  --include=slurmctld,slurmd,slurm-client,slurmdbd,slurm-wlm-mysql-plugin "$suite" "$root" "deb $mirror $suite main"
# The programs get the loader and the libraries of their own suite.
libraries=$(cd "$root/usr/lib/$(uname -m)-linux-gnu" && pwd)
loader=$(ls "$root"/usr/lib*/ld-linux-*.so.* | head -1)
mkdir "$root/bin"
for program in sacct sacctmgr sbatch scancel scontrol sinfo squeue srun slurmctld-wlm slurmd-wlm slurmdbd slurmstepd-wlm; do
  for file in "$root"/usr/bin/$program "$root"/usr/sbin/$program; do
    [ -f "$file" ] || continue
    patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$libraries:$libraries/slurm-wlm" "$file"
    ln -s "$file" "$root/bin/${program%-wlm}"
  done
done
"$root/bin/slurmctld" -V
