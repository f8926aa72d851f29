"""Text that teaches a model to draw: requests with <GEN>, answers with <h>prompt</h> (R3.9)."""
