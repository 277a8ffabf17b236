"""The store: its speed compared with others, and its behaviour under crashes, hostile frames and overload."""
