"""Everything that only a GPU can tell, in one command: `python -m benchmarks.gpu --out DIR`.

A plan is an ordered list of stages. Each stage runs in a process of its own within a time limit, and its result is
written to `DIR/gpu.json` as soon as it ends. docs/gpu.md describes how to call it and what to do with the results.
"""
