"""State: what users did since the training, and saved models."""
