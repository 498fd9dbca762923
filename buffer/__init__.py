"""The prompt ledger and replay store."""
