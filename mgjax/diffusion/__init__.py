"""Pictures from words: SDXL."""
