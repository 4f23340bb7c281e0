"""The web page: one reader of Redis for all its watchers, an HTTP interface, and plain pages."""
