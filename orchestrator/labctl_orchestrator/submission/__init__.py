"""Jobs into Slurm's queue, and out of it."""
