"""Networks and objectives for study; nothing else of the package imports them."""
