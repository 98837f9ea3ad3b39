"""The command line's one use of ZeroMQ."""

import zmq


def new_keypair() -> tuple[str, str]:
    """A fresh CURVE key pair: public and secret, 40 characters of Z85 each."""
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")
