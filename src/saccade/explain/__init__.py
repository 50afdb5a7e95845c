"""Looking inside models and mechanisms, and ordering them: a folder a paper."""
