"""Where the learner publishes its weights."""
