"""What `python -m t2v.benchmark what=...` measures: plain functions of rows, one after the other where each takes long."""
