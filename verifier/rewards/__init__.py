"""The registry of rewards, and the rewards."""
