"""Mini-Gemini in JAX/Flax."""
