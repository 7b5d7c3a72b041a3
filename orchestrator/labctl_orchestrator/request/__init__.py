"""What is asked for: settings, requests, the plan of runs and jobs."""
