"""From overrides to a checked plan of the run."""
