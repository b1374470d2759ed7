"""The virtqueue and the guest's memory."""
