"""What ours is measured against, each re-stated as its users run it."""
