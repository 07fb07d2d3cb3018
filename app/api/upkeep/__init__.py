"""What an API process does in the background."""
