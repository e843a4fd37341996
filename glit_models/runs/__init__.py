"""What every long job needs: a lock, files written whole, a state with a spare, stop signals, console, processes."""
