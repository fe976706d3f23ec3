"""What one looks with, measures with, and makes the embedded models with; run as `python -m tools.NAME`."""
