"""The train state and its optimizers."""
