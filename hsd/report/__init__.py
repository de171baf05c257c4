"""Runs side by side: one page of tables, curves and alarms."""
