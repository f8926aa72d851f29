"""What a TPU slice would do, told by its compiler: no TPU is needed."""
