"""Phases: what a training step is, where it is not the criterion's losses; one a file."""
