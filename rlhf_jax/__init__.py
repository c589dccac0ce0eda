"""Reward models and PPO for small language models, in JAX."""
