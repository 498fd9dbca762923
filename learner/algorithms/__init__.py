"""The algorithms, and the advantages, losses and corrections that they are made of."""
