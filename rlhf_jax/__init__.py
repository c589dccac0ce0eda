"""Reward models and PPO for small language models, in JAX."""

import os

# transformers would say at every start that PyTorch is missing; only its tokenizers are used here
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
