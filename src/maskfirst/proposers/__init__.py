"""Proposers: what finds masks."""
