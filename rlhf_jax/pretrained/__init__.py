"""Weights and tokenizers as others publish them, and prompts in the chat template."""
