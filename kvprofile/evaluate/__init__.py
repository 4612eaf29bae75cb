"""What merging does to a model's answers, measured through the real runtime."""
