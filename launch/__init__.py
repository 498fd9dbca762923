"""The entry points: start, watch and restart a run."""
