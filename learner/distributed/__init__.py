"""DeepSpeed, the processes of the ranks, and the collectives between them."""
