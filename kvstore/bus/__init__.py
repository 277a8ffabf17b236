"""Control messages about values: announcements of residency, reports, and fetch plans."""
