"""Feature-map attention and backbone blocks, a file a paper."""
