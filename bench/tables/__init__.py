"""What the tables and figures of the pages are made with."""
