"""Received groups become packed microbatches."""
