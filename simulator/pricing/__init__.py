"""How long it takes: every operation, block and stage in seconds, for the hardware at hand."""
