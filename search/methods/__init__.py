"""Search methods: they propose networks, generation by generation, and choose the most promising ones."""
