"""Runs rewards in separate processes with deadlines and memory limits."""
