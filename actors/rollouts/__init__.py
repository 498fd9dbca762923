"""Sampling of completions, and their packing as groups of trajectories."""
