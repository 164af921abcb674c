"""Run a step program: events in SimPy, or a max-plus replay for many plans. No physics."""
