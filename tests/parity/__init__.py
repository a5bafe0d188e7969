"""Parity: our models, built through public recipes, against arrays, losses and tables that the original projects made.

`python -m tests.parity DIR` compares a whole folder of such fixtures and fails for anything in it that it does not cover.
"""
