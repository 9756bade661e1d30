"""Hugging Face files of adapters and base models."""
