"""Metrics: what is kept of compared pictures, and the scores that follow; one a file."""
