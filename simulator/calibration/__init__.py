"""Measure a real mixture-of-experts training step on this machine, fit its costs, and prove the fit. The only place that imports torch."""
