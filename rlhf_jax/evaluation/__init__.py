"""Policies side by side on unseen prompts."""
