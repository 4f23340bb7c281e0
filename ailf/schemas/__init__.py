"""Settings of the building blocks."""
