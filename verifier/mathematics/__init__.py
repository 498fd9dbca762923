"""Finds the final answer in a completion, and decides whether two mathematical answers are equal."""
