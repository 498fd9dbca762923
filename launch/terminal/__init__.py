"""What a terminal shows during a run and at its end."""
