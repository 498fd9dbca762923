"""The buffer: prompt ledger, replay of scored groups, and the transport and weights code that all processes share."""
