"""Operators that torch does not have, in torch."""
