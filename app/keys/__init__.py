"""Who may use the service, and who owns jobs and videos."""
