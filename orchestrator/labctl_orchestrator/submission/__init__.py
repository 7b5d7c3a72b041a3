"""Submit, resubmit and cancel jobs; reserve a node."""
