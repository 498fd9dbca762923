"""Messages, their encoding and checks, and the encrypted sockets that carry them."""
