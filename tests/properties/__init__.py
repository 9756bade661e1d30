"""Invariants under random inputs."""
