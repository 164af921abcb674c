"""What one step does: FLOP, bytes, order. Never seconds, never hardware."""
