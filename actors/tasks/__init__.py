"""Tasks: prompts, gold answers and, for generated tasks, a teacher's traces."""
