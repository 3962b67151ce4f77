"""Stacks of mixers, and what a single layer cannot be."""
