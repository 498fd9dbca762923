"""From prompts to sampled episodes, scored and packed as groups of trajectories."""
