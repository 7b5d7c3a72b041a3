"""Templates of Slurm scripts: base.sbatch.j2, and a template per partition that extends it."""

from pathlib import Path

FOLDER = Path(__file__).parent
SUFFIX = ".sbatch.j2"
