"""Latency and backend CPU of ours, the Rust and the C virtiofsd, side by side in real guests."""
