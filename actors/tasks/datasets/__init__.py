"""Tasks whose problems are read from files."""
