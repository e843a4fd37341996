"""Run all measurements that need a GPU in one command: `python -m benchmarks.gpu --out DIR`.

A plan is an ordered list of stages. Each stage runs in a separate process within a time limit, and its result is
written to `DIR/gpu.json` as soon as it ends. docs/gpu.md describes the usage and the evaluation of results.
"""
