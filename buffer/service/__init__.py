"""The buffer process: the server loop and the answers to requests."""
