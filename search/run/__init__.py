"""Runs of a whole search in a folder: its stages, tasks for workers, plans, rankings and extracted networks."""
