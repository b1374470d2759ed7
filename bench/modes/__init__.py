"""What the cache modes gain and cost, side by side in real guests."""
