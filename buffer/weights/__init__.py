"""Distribution of published weights: the weight server, deltas, shared memory, relays."""
