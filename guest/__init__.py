"""What runs inside a guest, or in place of one: `guest.guest.Guest` mounts a share without a machine."""
