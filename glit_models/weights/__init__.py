"""Weights: which exist, where they lie, what a weight folder is, and how weights are verified and published."""
