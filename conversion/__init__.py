"""Checkpoints from and to HuggingFace layouts."""
