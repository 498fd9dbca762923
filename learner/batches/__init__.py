"""From received groups to packed microbatches."""
