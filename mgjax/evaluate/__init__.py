"""Asking a trained model questions in bulk, and counting what it gets right."""
