"""The main job, shown: two guests share a directory, and an account of who saw what after how long."""
