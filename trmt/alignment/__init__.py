"""Which word translates which."""
