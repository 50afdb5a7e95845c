"""Complete networks: a folder a paper, and beside them what the networks of a task share."""
