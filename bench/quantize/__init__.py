"""What quantising a model's weights costs in quality, by method, bytes and calibration."""
