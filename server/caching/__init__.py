"""What a guest may cache and for how long, and how changes are made known to those who cache."""
