"""The tests of CPython that can't pass, or that don't meet our transport, each with its reason.

Keys are patterns of ids (``fnmatch``). Everything listed is run all the same: a test in ``EXCEPTIONS`` that passes fails the run, and so does one that meets our transport although it
is listed in ``WITHOUT_US``.
"""

from __future__ import annotations

from typing import Final

__all__ = ("EXCEPTIONS", "NO_HANDSHAKE", "WITHOUT_US", "WITHOUT_US_NEWER")

EXCEPTIONS: Final[dict[str, str]] = {
    "test_sslproto.ProactorStartTLSTests.*": "CPython runs them on Windows only",
}

_SSLPROTO: Final = (
    "tests asyncio.sslproto.SSLProtocol itself, which our loops leave to asyncio: it is as it was"
)
_PLAIN: Final = "has no TLS; our loops leave it to asyncio"

#: No transport and no handshake of ours is involved.
WITHOUT_US: Final[dict[str, str]] = {
    "test_sslproto.SslProtoHandshakeTests.*": _SSLPROTO,
    "test_sslproto.*.test_buf_feed_data": "tests a function of asyncio.protocols",
    "test_sslproto.*.test_start_tls_wrong_args": "is about arguments that are refused",
    "test_ssl.TestSSL.test_connect_accepted_socket": _PLAIN,
    "test_ssl.TestSSL.test_connect_timeout_warning": "connects to a port where nobody listens",
    "test_ssl.TestSSL.test_ssl_connect_accepted_socket": "makes two contexts and ends (sic)",
    "test_sendfile.*.test_sock_sendfile_*": _PLAIN,
    "test_sendfile.*.test_sendfile": _PLAIN,
    "test_sendfile.*.test_sendfile_[!s]*": _PLAIN,
    "test_events.*.test_create_*unix_*": "Unix sockets have no kernel TLS; our loops leave them to asyncio",
    "test_events.*.test_connect_accepted_socket_ssl_timeout_for_plain_socket": "is about arguments that are refused",
    "test_streams.*.test_open_unix_connection_no_loop_ssl": "Unix sockets have no kernel TLS; our loops leave them to asyncio",
}

#: The same for tests that Python 3.11 does not have.
WITHOUT_US_NEWER: Final[dict[str, str]] = {
    "test_streams.*.test_streamwriter_start_tls_updates_reader_transport": "is about asyncio's streams, with a mock for a loop",
}

#: A handshake of ours begins, and is not meant to end well: there is no transport.
NO_HANDSHAKE: Final[dict[str, str]] = {
    "test_ssl*.test_create_connection_ssl_failed_certificate": "the certificate is refused",
    "test_ssl*.test_create_connection_ssl_slow_handshake": "the server never answers",
    "test_ssl*.test_handshake_timeout*": "the server never answers",
    "test_ssl.TestSSL.test_ssl_handshake_timeout": "the server never answers",
    "test_ssl.TestSSL.test_ssl_handshake_connection_lost": "the server closes",
    "test_ssl*.test_start_tls_slow_client_cancel": "the server never answers",
    "test_events.*.test_create_server_ssl_match_failed": "the certificate is refused",
    "test_events.*.test_create_server_ssl_verify_failed": "the certificate is refused",
}
