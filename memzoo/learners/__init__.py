"""What an update does, as pure functions: init, update, and what comes of it."""
