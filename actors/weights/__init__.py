"""Brings published weights from the learner to this host and into vLLM."""
