"""Values between machines."""
