"""Makes a trained network smaller and faster for deployment."""
