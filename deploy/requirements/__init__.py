"""What each image installs, by hash: written by `python -m deploy.requirements.generate`."""
