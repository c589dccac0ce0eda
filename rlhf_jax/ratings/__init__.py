"""Ratings by hand: the questionnaire, their file, and how raters agree."""
