"""The buffer's process: the socket loop and what it answers."""
