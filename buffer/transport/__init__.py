"""Messages, their checks, and the encrypted sockets that carry them."""
