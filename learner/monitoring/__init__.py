"""What a run reports, and what stops it."""
