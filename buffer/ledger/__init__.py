"""What happened to every prompt and group: the ledger on disk, and the rules over it."""
