"""A renderer of Quarto documents for where Quarto is not installed: `python -m rlhf_report.quarto`.

It knows nothing of this project: a document is executed once and written as page, paper, notebook.
"""
