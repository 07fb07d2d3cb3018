"""Who may use the service, and whom jobs and videos belong to."""
