"""ViT-P: points of masks, the namer against the original's numbers, and its blend with another namer."""
