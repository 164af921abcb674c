"""Decide: go through plans and pick."""
