"""Preference pairs and prompts, where they come from, and their division into parts."""
