"""The processes of a run: their command lines, their start, supervision and end."""
