"""What the estimate is multiplied by, from steps that others have measured on TPUs."""

# benchmarks/anchors.py compiles their shapes and prints estimate, measurement and ratio;
# docs/tpu.md has the table.  The factors are the geometric means of the ratios on a generation,
# for sketches and for programs that were compiled whole; nobody published a v4 that we compiled,
# so its factor is the mean of all.
SKETCH = {"v4": 1.07, "v5e": 1.06, "v5p": 1.02, "v6e": 1.21}
WHOLE = {"v4": 0.97, "v5e": 0.97, "v5p": 0.95, "v6e": 0.99}
