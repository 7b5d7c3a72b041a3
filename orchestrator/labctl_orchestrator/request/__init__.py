"""Settings, submissions, sweeps, and the plan of runs and jobs."""
