"""Complete networks, a folder (or file) a paper."""
