"""One file per diagnosis, each a pure function of a base spectrum and an update."""
