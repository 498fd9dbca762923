"""Scoring in processes of their own, with deadlines and bounded memory."""
