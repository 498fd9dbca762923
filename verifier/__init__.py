"""Text in, Score out."""
