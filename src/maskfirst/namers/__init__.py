"""Namers: what says what a mask is."""
