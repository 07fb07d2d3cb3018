"""What the dashboards show: one module each, written as rows of panels with their queries."""
