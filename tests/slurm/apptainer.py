"""A real Apptainer on Debian 12, and an image for the tests.

Debian's package is built for a newer C library than Debian 12's. It is unpacked below .cache beside that library, and its two
programs are made to use it. Nothing is installed into the system, but for patchelf and squashfs-tools.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.debian import install
from tests.models import ROOT
from tests.parts import PartMissing

SUITE: Final = "sid"
PACKAGES: Final = ("apptainer", "libc6")
TOOLS: Final = {"patchelf": "patchelf", "mksquashfs": "squashfs-tools"}  # program: package
PROGRAMS: Final = ("usr/bin/apptainer", "usr/lib/x86_64-linux-gnu/apptainer/bin/starter")
LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
# What an image needs of this machine, for this virtual environment to run inside.
SYSTEM: Final = ("/usr", "/etc/alternatives")


def install_apptainer() -> Path:
    """The folder of the program `apptainer`: the machine's, else an unpacked one. Raises PartMissing."""
    if found := shutil.which("apptainer"):
        return Path(found).parent
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PartMissing("apptainer is not installed, and only root on Debian 12 can unpack it")
    root = ROOT / ".cache" / "apptainer"
    root.parent.mkdir(exist_ok=True)
    with root.with_name(".apptainer.lock").open("w") as lock:  # of the processes of pytest-xdist one unpacks it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            shutil.rmtree(root, ignore_errors=True)
            try:
                _unpack(root)
            except (subprocess.CalledProcessError, OSError) as error:
                raise PartMissing(f"{error} {getattr(error, 'stderr', '')}") from error
            (root / "done").touch()
    return root / "usr/bin"


def _unpack(root: Path) -> None:
    install([*TOOLS.values()], lambda: [program for program in TOOLS if shutil.which(program) is None])
    apt = root / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    targets = _run("apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN)", "Created-By: Packages").splitlines()
    mirror = next(line.split()[0] for line in targets if line.endswith(" Debian"))
    (apt / "sources.list").write_text(f"deb {mirror} {SUITE} main\n")
    # A mirror's copy may be some weeks old.
    options = [f"Dir::Etc::sourcelist={apt}/sources.list", "Dir::Etc::sourceparts=-", f"Dir::State::lists={apt}/lists",
               f"Dir::Cache={apt}/cache", "Acquire::Check-Valid-Until=false", "APT::Sandbox::User=root"]  # fmt: skip
    words = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    _run(*words, "update", cwd=apt)
    _run(*words, "download", *PACKAGES, cwd=apt)
    for package, folder in (("apptainer", root), ("libc6", root / "libc6")):
        (archive,) = apt.glob(f"{package}_*.deb")
        _run("dpkg-deb", "--extract", str(archive), str(folder))
    shutil.rmtree(apt)
    libraries = root / "libc6" / LIBRARIES
    for program in PROGRAMS:
        _run("patchelf", "--set-interpreter", str(libraries / "ld-linux-x86-64.so.2"),
             "--set-rpath", f"{libraries}:/{LIBRARIES}", str(root / program))  # fmt: skip
    (root / "etc").rename(root / "usr/etc")  # where a moved Apptainer looks for it
    for folder in ("usr/var", "usr/lib/var"):
        (root / folder / "lib/apptainer/mnt/session").mkdir(parents=True)
    configuration = root / "usr/etc/apptainer/apptainer.conf"
    text = configuration.read_text()
    # Root of a virtual machine may lack some capabilities. Without the home folder, only what labctl binds is there.
    for key, value in (("root default capabilities", "no"), ("mount home", "no")):
        before = next(line for line in text.splitlines() if line.startswith(f"{key} ="))
        text = text.replace(f"\n{before}\n", f"\n{key} = {value}\n")
    configuration.write_text(text)


def _run(*words: str, cwd: Path | None = None) -> str:
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def build_image(apptainer: Path, image: Path) -> None:
    """An image of empty folders, and a /opt/image/python that starts this environment's. `binds` brings the rest."""
    folder = image.with_suffix("")
    for name in ("usr", "proc", "sys", "dev", "tmp", "root", "var/tmp", "etc/alternatives", "opt/image"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    python = folder / "opt/image/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")
    _run(str(apptainer / "apptainer"), "build", str(image), str(folder))


def binds() -> list[str]:
    """The folders of this machine that make the image's Python this one."""
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    return list(dict.fromkeys([*SYSTEM, sys.base_prefix, sys.prefix, *packages]))
