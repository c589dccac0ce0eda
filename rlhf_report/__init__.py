"""The report: one module a chapter, its look, its tables, and what is handed in."""
