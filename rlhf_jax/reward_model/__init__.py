"""The reward model: posts as packed tokens, its training, and what held-out pairs say of it."""
