"""DAX: file pages in the guest's window (docs/dax.md)."""
