"""Tasks: prompts, gold answers and, for the embedded ones, teacher traces."""
