"""Generated tasks that are answered in one turn."""
