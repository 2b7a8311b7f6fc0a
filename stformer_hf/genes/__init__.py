"""Which gene is which."""
