"""Adapters over quantised bases."""
