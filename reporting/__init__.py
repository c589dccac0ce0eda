"""Run directories, figures, tables and the renderer used where Quarto is not installed."""
