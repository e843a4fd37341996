"""What is measured, not asserted: each module is a command, `python -m benchmarks.NAME`."""
