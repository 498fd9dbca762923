"""The algorithms, their advantages, losses and corrections."""
