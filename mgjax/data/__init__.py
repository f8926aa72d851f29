"""Host side: data files to NumPy batches, text to ids and back, pictures to squares.  No JAX."""
