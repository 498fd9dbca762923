"""Turns overrides into a checked plan of the run."""
