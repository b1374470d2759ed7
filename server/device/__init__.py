"""The virtio-fs device: its request queues, and the event loop that serves them."""
