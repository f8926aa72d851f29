"""The benchmarks, one file each: prompt, parse, score, official files."""
