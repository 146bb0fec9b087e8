"""What `python -m t2v.benchmark what=...` measures: plain functions that return rows."""
