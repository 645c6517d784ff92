"""State: stores of user events, and saved models."""
