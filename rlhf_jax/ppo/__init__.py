"""Proximal policy optimisation against a frozen reward model."""
