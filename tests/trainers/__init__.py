"""Unmodified trainers and models of other projects, with our adapters and optimizer."""
