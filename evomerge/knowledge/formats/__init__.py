"""The files a base is read from and written to."""
