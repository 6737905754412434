"""Run by ``test_openssl`` with an OpenSSL configuration that allows one suite of TLS 1.3: both roles, and say the suite."""

from __future__ import annotations

from .helpers import (
    TLS13,
    Pki,
    check_takeover,
    ours_client,
    ours_server,
    run,
    their_client,
    their_server,
)


def main() -> None:
    pki = Pki()
    client, peer = ours_client(pki.client(TLS13)), their_server(pki.server(TLS13))
    run(client, peer)
    check_takeover(client.result(), peer)
    print(client.result().cipher[0])
    server, other = ours_server(pki.server(TLS13)), their_client(pki.client(TLS13))
    run(other, server)
    check_takeover(server.result(), other)
    print(server.result().cipher[0])


if __name__ == "__main__":
    main()
