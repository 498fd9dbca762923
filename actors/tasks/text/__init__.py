"""Generated tasks of one answer."""
