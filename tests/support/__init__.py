"""Models, training problems and references that several folders of tests use."""
