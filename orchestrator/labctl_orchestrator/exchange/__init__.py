"""Queries, exports, bundles, and input and output files that the user names."""
