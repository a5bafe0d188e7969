"""Foreign checkpoints brought into our models: opening, renaming, and a catalogue of their origins."""
