"""The prompt ledger on disk, and the rules for leases, batches and the curriculum."""
