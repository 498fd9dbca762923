"""Multi-turn tasks: boards, bandits, and the parser of a turn's actions."""
