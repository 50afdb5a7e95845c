"""KV-cache and token reduction, a file a paper."""
