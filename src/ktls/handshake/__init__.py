"""How the secrets come to be: an engine does the handshake, one record at a time, and gives its secrets away.

Start reading at ``engine`` (the seam), then ``openssl`` (the engine), ``keylog`` (how the secrets leave it), ``tickets`` (how session tickets
get back into it). No sockets here, and nothing waits: bytes in, bytes out.
"""
