"""The command line: a file a verb parses, calls and prints."""
