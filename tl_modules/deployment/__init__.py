"""What makes a trained network smaller and faster before it is used."""
