"""What a backend links with: its membership of a domain, and the DAX allocator's client."""
