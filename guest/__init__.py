"""What runs inside a guest, or in place of one."""
