"""The Slurm script templates that labctl ships: base.sbatch.j2, and one a partition that extends it."""

from pathlib import Path

FOLDER = Path(__file__).parent
SUFFIX = ".sbatch.j2"
