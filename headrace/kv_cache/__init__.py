"""Which page of the cache holds what, and the arrays behind it."""
