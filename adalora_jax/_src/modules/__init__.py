"""Which weights of a Flax model are adapted, and how a term is added."""
