"""Who runs a network: the driver of search, and how matrix products are made."""
