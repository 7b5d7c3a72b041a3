"""All that labctl knows about Slurm: partitions, scripts, submission, the state of jobs, and what went wrong."""
