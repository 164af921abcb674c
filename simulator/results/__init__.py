"""What a step comes to: time, memory, money, energy, and how sure that is."""
