"""What is put on or around somebody else's model: a folder a paper."""
