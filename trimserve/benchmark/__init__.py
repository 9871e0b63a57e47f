"""`trimserve bench`: two folders measured in processes that take turns."""
