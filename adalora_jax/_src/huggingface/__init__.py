"""Files of Hugging Face, for adapters and base models."""
