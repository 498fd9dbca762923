"""Published weights on their way into the engine."""
