"""What an API process does beside answering."""
