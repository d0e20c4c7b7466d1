"""Weights of other projects in and out; nothing else needs this package."""
