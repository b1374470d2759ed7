"""DAX: file pages in the guest's window (docs/concepts/dax.md)."""
