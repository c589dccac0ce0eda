"""Trained models in the layouts of transformers and PEFT, and their model cards."""
