"""The router's web page and its data."""
