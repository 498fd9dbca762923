"""Grades completions: extracts the answer, compares it with the gold, and turns the verdict into a Score."""
