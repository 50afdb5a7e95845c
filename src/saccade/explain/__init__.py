"""Looking inside models and mechanisms, and ordering them."""
