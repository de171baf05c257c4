"""Where a run's numbers go beside its folder's JSONL files."""
