"""Tasks of several turns: boards, bandits, and what counts as an action."""
