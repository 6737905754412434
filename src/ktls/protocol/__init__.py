"""What TLS says after the handshake: no sockets, no threads, no clock. Start reading at ``connection``."""
