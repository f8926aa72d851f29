"""What the estimate is multiplied by, from steps that others have measured on TPUs."""

# benchmarks/anchors.py compiles their shapes and prints estimate, measurement and ratio;
# docs/tpu.md has the table.  The factors are the geometric means of the ratios, for programs that
# were compiled whole and for sketches.
WHOLE, SKETCH = 1.01, 1.16
