"""Other people's trainers and models, unchanged, with our adapters and optimizer."""
