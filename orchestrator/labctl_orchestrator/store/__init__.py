"""A workspace's files and the database that indexes them."""
