"""The command line of spectra: parses, calls, prints."""
