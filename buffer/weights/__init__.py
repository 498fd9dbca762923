"""Published weights on their way to the actors: versions, differences, shared memory, relays."""
