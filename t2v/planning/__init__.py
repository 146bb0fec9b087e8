"""What a training will need before any GPU hour is spent: memory counted from the model itself, length, and set-up errors."""
