"""The implementation; what is public, the modules above it name in ``__all__``."""
