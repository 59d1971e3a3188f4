"""Where work is done: this process, or workers of a Ray cluster."""
