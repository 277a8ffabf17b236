"""Values on a device."""
