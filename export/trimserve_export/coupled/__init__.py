"""Pre-trained layers coupled as a reversible network (MEFT): what training and export share."""
