"""Tasks whose problems are read from data sets."""
