"""Support for long jobs: a lock, atomic file writes, a state with a spare copy, stop signals, console, processes."""
