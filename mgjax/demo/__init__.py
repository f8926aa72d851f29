"""The demo's miniature world: real photographs with small signs, as LLaVA data, and its report."""
