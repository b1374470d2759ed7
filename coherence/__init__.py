"""The coherency service and everything that touches its shared memory."""
