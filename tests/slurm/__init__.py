"""End-to-end tests against a real Slurm cluster that they start themselves."""
