"""Transfer of values between machines: the protocol, the client and the target's server."""
