"""Confront predictions with published and measured runs."""
