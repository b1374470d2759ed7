"""What DAX gains and costs, measured in real guests."""
