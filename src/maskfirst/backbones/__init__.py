"""Trunks (plain ViTs) and backbones (maps for mask proposers)."""
