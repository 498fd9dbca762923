"""Which processes a run consists of, and who starts, watches and ends them."""
