"""Where runs stand, and why."""
