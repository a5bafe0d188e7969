"""Data sets, their vocabularies, augmentation, and the check of what is wrong with them."""
