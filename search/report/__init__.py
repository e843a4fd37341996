"""The report of a search: reading the files in its folder, and drawing them as a page with figures."""
