"""Training: state, optimizer, loss, step, loop."""
