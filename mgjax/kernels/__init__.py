"""Pallas kernels for TPUs, each with the same computation as XLA runs it beside it or passed in."""
