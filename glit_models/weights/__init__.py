"""Find, load, verify, convert and publish weights."""
