"""One file a schema version; each changes the one before it without loss."""
