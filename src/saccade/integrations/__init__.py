"""Into transformers and other libraries."""
