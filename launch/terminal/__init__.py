"""The terminal's output during a run and at its end."""
