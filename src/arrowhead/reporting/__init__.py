"""What stages report, shown to people and recorded in MLflow."""
