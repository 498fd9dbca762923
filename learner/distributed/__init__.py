"""DeepSpeed, ranks, and what the ranks say to each other."""
